"""Sums and differences of LoRAs as one file, against dense float64 algebra that never looks at factors."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.test_files import largest_file
from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.formats import read_lora, write_lora
from trainer.formats.__main__ import main
from trainer.lowrank import LowRank

Dense = dict[str, Tensor]
FAILED, BAD_INPUT = 1, 2  # exit codes


def creature(seed: int, rank: int, targets: str = "i2l") -> AdapterWeights:
    """A LoRA for the demo's model, with clearly different singular values."""
    config, random = AdapterConfig(target_modules=targets), torch.Generator().manual_seed(seed)
    factors = {}
    for name, size in adapter.target_modules(qwen_image.transformer_on_meta("demo/model"), config).items():
        a, b = torch.randn(rank, size[0], generator=random), torch.randn(size[1], rank, generator=random)
        factors[name] = LowRank(a, b * 0.7 ** torch.arange(rank))
    return AdapterWeights(factors)


def dense(weights: AdapterWeights) -> Dense:
    return {name: x.b.double() @ x.a.double() for name, x in weights.factors.items()}


def written(path: Path) -> Dense:
    return dense(read_lora(path)[0])


def weighted(parts: Sequence[tuple[Dense, float]]) -> Dense:
    found: Dense = {}
    for changes, weight in parts:
        for name, change in changes.items():
            found[name] = found.get(name, 0) + weight * change
    return found


def best(changes: Dense, rank: int) -> Dense:
    """Each at a rank, by a dense SVD."""
    found = {}
    for name, change in changes.items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        found[name] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return found


def assert_same(found: Dense, expected: Dense, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys() and expected
    for name, change in expected.items():
        assert (found[name] - change).norm() <= tolerance * change.norm(), name


def made_of(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["warm_start_made_of"]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two creatures in layouts of different programs, the second with an alpha of its own."""
    folder = tmp_path_factory.mktemp("creatures")
    one, other = folder / "zorp.safetensors", folder / "blip.safetensors"
    write_lora(one, creature(0, 6), {"modelspec.trigger_phrase": "zorp", "ss_network_dim": "6", "author": "me"})
    metadata = {"modelspec.trigger_phrase": "blip", "ss_network_dim": "6", "author": "me", "warm_start": "{}"}
    write_lora(other, creature(1, 4), metadata, layout="kohya", alpha=2.0)
    return one, other


def test_half_of_each_creature_is_half_of_both_changes(files: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = map(str, files)
    out = tmp_path / "both.safetensors"
    assert main(["merge", one, other, "--weights", "0.5", "0.5", "--output", str(out)]) == 0
    expected = weighted([(dense(creature(0, 6)), 0.5), (dense(creature(1, 4)), 0.5)])
    assert_same(written(out), expected)
    assert {min(tensor.shape) for tensor in load_file(out).values()} == {10}
    short = tmp_path / "short.safetensors"
    assert main(["merge", one, other, "--weights", "0.5", "0.5", "--rank", "5", "--output", str(short)]) == 0
    assert_same(written(short), best(expected, 5), 1e-5)


def test_it_is_what_peft_s_exact_combination_applies(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Both files on a model as two adapters, which PEFT adds up by itself."""
    out, module = tmp_path / "both.safetensors", "transformer_blocks.0.attn.to_q"
    assert main(["merge", *map(str, files), "--weights", "0.7", "-0.3", "--output", str(out)]) == 0
    model = nn.ModuleDict({"to_q": nn.Linear(128, 128)})
    for name, seed, rank, weight in (("one", 0, 6, 0.7), ("other", 1, 4, -0.3)):
        config = LoraConfig(r=rank, lora_alpha=rank * weight, target_modules=["to_q"])
        inject_adapter_in_model(config, model, adapter_name=name)
        x = creature(seed, rank).factors[module]
        state = {"to_q.lora_A.weight": x.a, "to_q.lora_B.weight": x.b}
        set_peft_model_state_dict(model, state, adapter_name=name)
    layer = model["to_q"]
    with torch.no_grad():
        expected = layer.get_delta_weight("one") + layer.get_delta_weight("other")
    torch.testing.assert_close(written(out)[module].float(), expected, rtol=1e-4, atol=1e-4)


def test_weights_on_both_factors_are_squared_and_added_factors_bring_cross_terms(tmp_path: Path) -> None:
    """The mistake of some programs, which multiply a and b of each LoRA by its weight, and then add them up."""
    one, other, out = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "out"))
    write_lora(one, creature(0, 4), {})
    write_lora(other, creature(1, 4), {})
    assert main(["merge", str(one), str(other), "--weights", "0.5", "0.5", "--output", str(out)]) == 0
    for name, found in written(out).items():
        (a, b), (c, d) = ((x.double() for x in creature(seed, 4).factors[name]) for seed in (0, 1))
        right = 0.5 * b @ a + 0.5 * d @ c
        assert (found - right).norm() <= 1e-6 * right.norm()
        squared = torch.cat([0.5 * b, 0.5 * d], dim=1) @ torch.cat([0.5 * a, 0.5 * c])
        torch.testing.assert_close(squared, 0.5 * right)  # a weight of 0.5 acts as 0.25
        mixed = (0.5 * b + 0.5 * d) @ (0.5 * a + 0.5 * c)
        torch.testing.assert_close(mixed, squared + 0.25 * (b @ c + d @ a))
        assert 0.6 < float((mixed - right).norm() / right.norm()) < 0.8


def test_the_difference_is_exact_and_undoes_the_sum(files: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = map(str, files)
    less, both, back = (tmp_path / f"{name}.safetensors" for name in ("less", "both", "back"))
    assert main(["subtract", one, other, "--output", str(less)]) == 0
    assert_same(written(less), weighted([(dense(creature(0, 6)), 1.0), (dense(creature(1, 4)), -1.0)]))
    assert main(["merge", one, other, "--output", str(both)]) == 0
    assert main(["subtract", str(both), other, "--rank", "6", "--output", str(back), "--layout", "kohya"]) == 0
    assert_same(written(back), dense(creature(0, 6)), 1e-5)


def test_a_difference_of_equals_leaves_nothing(
    files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "none.safetensors"
    for options in ([], ["--rank", "4"], ["--energy", "0.9"]):
        assert main(["subtract", str(files[0]), str(files[0]), "--output", str(out), *options]) == BAD_INPUT
    assert "nothing is left" in caplog.text and not out.exists()


@pytest.mark.parametrize("share", [0.6, 0.95, 1.0])
def test_the_rank_for_an_energy_is_that_of_dense_svds(
    files: tuple[Path, Path], tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["merge", *map(str, files), "--energy", str(share), "--output", str(out)]) == 0
    expected = weighted([(dense(creature(0, 6)), 1.0), (dense(creature(1, 4)), 1.0)])
    squares = torch.stack([torch.linalg.svdvals(change)[:10].square() for change in expected.values()])
    kept = squares.sum(dim=0).cumsum(0) / squares.sum()
    rank = int((kept < share - 1e-9).sum()) + 1
    assert {min(tensor.shape) for tensor in load_file(out).values()} == {rank}
    printed = capsys.readouterr().out
    assert f"{len(expected)} modules, rank {rank}, with {float(kept[rank - 1]):.2%} of the energy" in printed
    told = made_of(out)
    assert told["energy_kept"]["total"] == pytest.approx(float(kept[rank - 1]), rel=1e-6)
    for name, own in zip(expected, squares, strict=True):
        assert told["modules"][name] == pytest.approx(float(own[:rank].sum() / own.sum()), abs=2e-6)
    of_type = [number for number, name in enumerate(expected) if name.endswith("txt_mod.1")]
    part = squares[of_type]
    row = f"{len(of_type)}  {float(part.sum() / squares.sum()):13.2%}  {float(part[:, :rank].sum() / part.sum()):6.2%}"
    assert next(line for line in printed.splitlines() if line.startswith("txt_mod.1")).endswith(row)


def test_modules_that_some_files_lack_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, narrow, out = (tmp_path / f"{name}.safetensors" for name in ("wide", "narrow", "out"))
    write_lora(wide, creature(0, 2, "all"), {})
    write_lora(narrow, creature(1, 2, "attention"), {})
    assert main(["merge", str(narrow), str(wide), "--weights", "2", "1", "--output", str(out)]) == 0
    assert_same(
        written(out), weighted([(dense(creature(1, 2, "attention")), 2.0), (dense(creature(0, 2, "all")), 1.0)])
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("only in")]
    assert line.startswith(f"only in {wide}: 24 modules (img_mlp.net.2, txt_mlp.net.2, img_mod.1, txt_mod.1, img_mlp")


def test_a_lokr_is_added_as_it_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    """In one module; its dW is that of a dense Kronecker product."""
    name, random = "transformer_blocks.0.attn.to_q", torch.Generator().manual_seed(3)
    first, second = torch.randn(4, 4, generator=random), torch.randn(32, 32, generator=random)
    lokr, out = tmp_path / "lokr.safetensors", tmp_path / "out.safetensors"
    stem = f"diffusion_model.{name}"
    save_file({f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second, f"{stem}.alpha": torch.tensor(1.0)}, lokr)
    assert main(["merge", str(files[0]), str(lokr), "--weights", "1", "0.25", "--output", str(out)]) == 0
    expected = dense(creature(0, 6))
    expected[name] = expected[name] + 0.25 * torch.kron(first.double(), second.double())
    assert_same(written(out), expected)


def test_the_metadata_says_what_it_was_made_of(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    options = ["--weights", "0.5", "0.25", "--layout", "kohya", "--dtype", "bf16", "--rank", "3"]
    assert main(["merge", *map(str, files), *options, "--output", str(out)]) == 0
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "3" and metadata["modelspec.title"] == "both" and metadata["author"] == "me"
    assert metadata["modelspec.trigger_phrase"] == "zorp, blip" and "warm_start" not in metadata
    assert made_of(out)["sum_of"] == [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "weight": weight}
        for path, weight in zip(files, (0.5, 0.25), strict=True)
    ]


def test_peft_gets_a_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both"
    assert main(["merge", *map(str, files), "--layout", "peft", "--rank", "4", "--output", str(out)]) == 0
    expected = best(weighted([(dense(creature(0, 6)), 1.0), (dense(creature(1, 4)), 1.0)]), 4)
    assert_same(written(out), expected, 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both"]


def test_all_problems_are_told_at_once(
    files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.formats.lora.LoraFile.read", None)  # no tensor is read
    small, there = tmp_path / "small.safetensors", tmp_path / "there.txt"
    size = torch.ones(1, 64)
    write_lora(small, AdapterWeights({"transformer_blocks.0.attn.to_q": LowRank(size, torch.ones(128, 1))}), {})
    there.write_text("x")
    words = ["merge", str(files[0]), str(small), str(tmp_path / "none.safetensors"), "--output", str(there)]
    options = ["--weights", "strong", "nan", "inf", "0", "--rank", "0", "--energy", "1.5"]
    assert main([*words, *options]) == BAD_INPUT
    for part in (
        "--rank and --energy: choose one of them",
        "--rank must be at least 1, not 0",
        "--energy must be above 0 and at most 1, as 0.95 is for 95 %, not 1.5",
        "must end in .safetensors",
        "is there already",
        '"strong" is no finite number',
        '"nan" is no finite number',
        '"inf" is no finite number',
        "--weights: 0 has no effect",
        "4 for 3 files",
        "none.safetensors: there is no such file",
        f"{small} was made for another model than {files[0]}: 1 of its 1 modules have another size; "
        "transformer_blocks.0.attn.to_q is 64 -> 128, and there 128 -> 128",
    ):
        assert part in caplog.text, part
    assert there.read_text() == "x"


def test_nan_in_a_file_is_named(files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, bad = load_file(files[0]), tmp_path / "bad.safetensors"
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, bad)
    out = tmp_path / "out.safetensors"
    assert main(["merge", str(files[1]), str(bad), "--output", str(out)]) == BAD_INPUT
    assert "bad.safetensors: " in caplog.text and "contains NaN or infinity" in caplog.text and not out.exists()


@pytest.mark.parametrize("layout", ["diffusion_model", "peft"])
def test_a_full_disk_leaves_nothing_half_written(
    files: tuple[Path, Path], tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / ("both" if layout == "peft" else "both.safetensors")
    words = ["merge", *map(str, files), "--layout", layout, "--output", str(out)]
    with largest_file(100_000):
        assert main(words) == FAILED
    assert "too large" in caplog.text and "give the same command again" in caplog.text
    assert [*out.parent.iterdir()] == []
    assert main(words) == 0
    assert_same(written(out), weighted([(dense(creature(0, 6)), 1.0), (dense(creature(1, 4)), 1.0)]))
