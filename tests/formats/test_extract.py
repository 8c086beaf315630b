"""A LoRA from two transformers, against dense SVDs of their difference, and the LoRA that one was made with."""

import json
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.test_merge import BAD_INPUT, FAILED, Dense, assert_same, best, creature, dense, written
from tests.test_files import largest_file
from trainer.formats import read_lora
from trainer.formats.__main__ import main
from trainer.formats.extract import Model
from trainer.formats.layouts import module_name
from trainer.lowrank import relative_difference

CONFIG = "demo/model/transformer/config.json"
Tensors = dict[str, Tensor]


def demo() -> Tensors:
    return {
        name: x.float() for name, x in load_file("demo/model/transformer/diffusion_pytorch_model.safetensors").items()
    }


def fine_tuned() -> Tensors:
    """Every Linear weight is changed at random, with singular values that fall, and some others too."""
    random, found = torch.Generator().manual_seed(5), demo()
    for name, weight in found.items():
        if name.endswith(".weight") and module_name(name.removesuffix(".weight")):
            u, s, vh = torch.linalg.svd(torch.randn(weight.shape, generator=random), full_matrices=False)
            found[name] = weight + 0.1 * (u * s * 0.8 ** torch.arange(len(s))) @ vh
    found["transformer_blocks.0.attn.to_q.bias"] += 0.5
    found["transformer_blocks.1.attn.norm_q.weight"] *= 2
    return found


def save(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """A folder as diffusers saves a transformer."""
    folder.mkdir(parents=True)
    shutil.copy(CONFIG, folder)
    names, stem = [*tensors], "diffusion_pytorch_model"
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors")
        return folder
    files = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in {*files.values()}:
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def changes(tuned: Tensors, base: Tensors) -> Dense:
    names = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
    pairs = {name: (tuned[f"{name}.weight"], base[f"{name}.weight"]) for name in names if module_name(name)}
    return {name: one.double() - other.double() for name, (one, other) in pairs.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fine-tuned transformer in shards, and its base in the folder of a pipeline."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "pipeline" / "transformer", demo())
    return save(folder / "tuned", fine_tuned(), shards=3), folder / "pipeline"


def test_it_is_the_best_of_its_rank_by_dense_svds(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, expected = tmp_path / "out.safetensors", changes(fine_tuned(), demo())
    assert main(["extract", *map(str, pair), "--rank", "6", "--output", str(out)]) == 0
    assert len(expected) == 62
    assert_same(written(out), best(expected, 6), 1e-5)
    squares = [torch.linalg.svdvals(change).square() for change in expected.values()]
    kept = sum(float(own[:6].sum()) for own in squares) / sum(float(own.sum()) for own in squares)
    assert f"62 modules, rank 6, with {kept:.2%} of the energy" in capsys.readouterr().out
    with safe_open(out, framework="pt") as file:
        told = json.loads(file.metadata()["warm_start_made_of"])
    assert told["energy_kept"]["total"] == pytest.approx(kept, rel=1e-9)
    assert (told["tuned"], told["base"]) == tuple(map(str, pair))


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_the_rank_for_an_energy_is_that_of_dense_svds(pair: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["extract", *map(str, pair), "--energy", str(share), "--output", str(out)]) == 0
    together = torch.zeros(512, dtype=torch.float64)
    for change in changes(fine_tuned(), demo()).values():
        own = torch.linalg.svdvals(change).square()
        together[: len(own)] += own
    rank = int((together.cumsum(0) < share * together.sum()).sum()) + 1
    assert max(min(tensor.shape) for tensor in load_file(out).values()) == rank > 1


def test_what_changed_beside_the_linear_layers_is_told(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", *map(str, pair), "--rank", "1", "--output", str(tmp_path / "out.safetensors")]) == 0
    tuned, base = fine_tuned(), demo()
    names = ("transformer_blocks.0.attn.to_q.bias", "transformer_blocks.1.attn.norm_q.weight")
    moved = sum(float((tuned[name].double() - base[name].double()).square().sum()) for name in names)
    size = sum(float(base[name].double().square().sum()) for name in names)
    whole = moved + sum(float(change.square().sum()) for change in changes(tuned, base).values())
    assert (
        f"not in the LoRA: 2 of 79 other tensors changed (attn.norm_q.weight, attn.to_q.bias), by "
        f"{(moved / size) ** 0.5:.2%} of their size; that is {moved / whole:.2%} of the energy of all changes"
    ) in capsys.readouterr().out


def test_the_lora_that_a_model_was_made_with_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, tuned = creature(0, 4), demo()
    for name, change in dense(lora).items():
        tuned[f"{name}.weight"] += 0.02 * change.float()
    folder, base, out = save(tmp_path / "tuned", tuned), save(tmp_path / "base", demo()), tmp_path / "out.safetensors"
    assert main(["extract", str(folder), str(base), "--rank", "4", "--output", str(out)]) == 0
    found = written(out)
    assert_same(found, {name: 0.02 * change for name, change in dense(lora).items()}, 1e-4)
    printed = capsys.readouterr().out
    assert "48 modules, rank 4, with 100.00% of the energy" in printed
    assert "the 79 other tensors, such as biases and norms, did not change" in printed


def test_a_single_file_with_comfyui_s_names_is_read(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Beside the transformer it holds other models."""
    tensors = {f"model.diffusion_model.{name}": x for name, x in fine_tuned().items()} | {"vae.x": torch.ones(3)}
    file, one, other = tmp_path / "whole.safetensors", tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, file)
    assert main(["extract", str(file), str(pair[1]), "--rank", "3", "--output", str(one)]) == 0
    assert main(["extract", *map(str, pair), "--rank", "3", "--output", str(other)]) == 0
    assert_same(written(one), written(other))


def test_only_two_tensors_are_read_at_a_time(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was read of a module is gone when the next one is."""
    read, alive, most = Model.tensor, weakref.WeakSet[Tensor](), 0

    def counting(self: Model, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Model, "tensor", counting)
    assert main(["extract", *map(str, pair), "--rank", "2", "--output", str(tmp_path / "out.safetensors")]) == 0
    assert 1 <= most <= 2


def test_all_problems_are_told_at_once(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    words = ["extract", str(tmp_path / "empty"), "no/such/folder", "--output", str(tmp_path / "out.bin")]
    assert main(words) == BAD_INPUT
    for part in ("must end in .safetensors", "--rank or --energy is needed", "has no transformer/config.json"):
        assert part in caplog.text, part
    assert 'and "no/such/folder" is not a Hugging Face id' in caplog.text


def test_models_that_do_not_belong_together_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = fine_tuned()
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name] = torch.ones(64, 128)
    del tensors["img_in.weight"]
    folder, out = save(tmp_path / "other", tensors), tmp_path / "out.safetensors"
    assert main(["extract", str(folder), str(pair[1]), "--rank", "2", "--output", str(out)]) == BAD_INPUT
    assert f"{folder} is not made from {pair[1]}: 2 of 62 Linear layers are missing" in caplog.text
    caplog.clear()
    tensors = {name: x.to(torch.float8_e4m3fn) if x.ndim == 2 else x for name, x in fine_tuned().items()}
    folder = save(tmp_path / "quantised", tensors)
    assert main(["extract", str(folder), str(pair[1]), "--rank", "2", "--output", str(out)]) == BAD_INPUT
    assert re.search("62 of its 62 Linear layers are quantised, .* as F8_E4M3: .* take the model in bf16", caplog.text)
    caplog.clear()
    folder = save(tmp_path / "foreign", {"blocks.0.weight": torch.ones(4, 4)})
    assert main(["extract", str(folder), str(pair[1]), "--rank", "2", "--output", str(out)]) == BAD_INPUT
    assert "no Linear layer of Qwen-Image's transformer is in it" in caplog.text
    assert not out.exists()


def test_nan_is_named_and_nothing_written(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, out = fine_tuned(), tmp_path / "out.safetensors"
    tensors["transformer_blocks.2.txt_mod.1.weight"][0, 0] = torch.nan
    folder = save(tmp_path / "tuned", tensors)
    assert main(["extract", str(folder), str(pair[1]), "--rank", "2", "--output", str(out)]) == BAD_INPUT
    assert "transformer_blocks.2.txt_mod.1.weight contains NaN or infinity" in caplog.text and not out.exists()


def test_a_full_disk_is_told_before_the_work_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out.safetensors"
    words = ["extract", *map(str, pair), "--rank", "8", "--output", str(out)]
    with largest_file(100_000):
        assert main(words) == FAILED
    assert [*out.parent.iterdir()] == []
    monkeypatch.setattr("trainer.formats.extract.nearest", None)  # the work
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert main(words) == BAD_INPUT
    assert re.search(r"--output: .* MB are needed in .*, where 0.0 MB are free", caplog.text)


def test_dtype_and_layout_change_nothing_but_the_rounding(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In bf16, and in the folder that PEFT reads."""
    one, other = tmp_path / "one", tmp_path / "other.safetensors"
    assert main(["extract", *map(str, pair), "--rank", "2", "--layout", "peft", "--output", str(one)]) == 0
    assert main(["extract", *map(str, pair), "--rank", "2", "--dtype", "bf16", "--output", str(other)]) == 0
    whole, rounded = read_lora(one)[0].factors, read_lora(other)[0].factors
    assert whole.keys() == rounded.keys() and len(whole) == 62
    assert max(relative_difference(x, rounded[name]) for name, x in whole.items()) < 0.01
