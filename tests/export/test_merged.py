"""A base with LoRAs folded in: the same pictures as base and LoRA, whole or not at all, and what is refused."""

import errno
import gc
import json
import os
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import trainer.files
from tests.export.made import export, random_lora, tree
from tests.helpers import BAD_INPUT, FAILED, FINISHED
from trainer.export import request
from trainer.files import content_hash, write_json

PROMPT = "a big creature in the middle, in a meadow"


@pytest.fixture
def lora(tiny_base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "loras" / "a.safetensors"
    random_lora(tiny_base, path)
    return path


def latents(
    folder: Path, lora: Path | None = None, strength: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What diffusers' own pipeline draws, before it is decoded."""
    pipe: Any = QwenImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="x")
        pipe.set_adapters(["x"], [strength])
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    return pipe(
        PROMPT, width=128, height=128, num_inference_steps=3, true_cfg_scale=1.0, generator=noise, output_type="latent"
    ).images


def test_the_merged_base_draws_what_base_and_lora_draw(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    before = tree(tiny_base)
    assert export("merged", "--base", tiny_base, "--lora", f"{lora}:0.7", "--output", tmp_path / "m") == FINISHED
    expected, plain = latents(tiny_base, lora, 0.7), latents(tiny_base)
    assert (expected - plain).abs().max() > 0.01
    assert torch.allclose(latents(tmp_path / "m"), expected, atol=1e-4)
    assert tree(tiny_base) == before
    assert {*tree(tmp_path / "m")} == {*before, "merged.json"}


def test_the_merged_demo_draws_what_base_and_lora_draw(tmp_path: Path) -> None:
    base, lora = Path("demo/model"), tmp_path / "loras" / "a.safetensors"
    random_lora(base, lora)
    asked = ("--base", base, "--lora", lora, "--output", tmp_path / "m", "--dtype", "fp32")
    assert export("merged", *asked) == FINISHED
    expected = latents(base, lora)
    assert (expected - latents(base)).abs().max() > 0.01
    assert torch.allclose(latents(tmp_path / "m"), expected, atol=1e-4)


def sharded(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The base with its transformer in shards."""
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "transformer")
    transformer = QwenImageTransformer2DModel.from_pretrained(base / "transformer").to(dtype)
    transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize(("stored", "asked"), [("bf16", None), ("fp32", "bf16")])
def test_each_weight_is_rounded_once(
    stored: str, asked: str | None, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    base = sharded(tiny_base, tmp_path / "base", trainer.files.DTYPES[stored])
    first = random_lora(tiny_base, tmp_path / "a.safetensors", seed=1, layout="kohya").factors
    second = random_lora(tiny_base, tmp_path / "b.safetensors", seed=2).factors
    loras = ("--lora", tmp_path / "a.safetensors", "--lora", f"{tmp_path / 'b.safetensors'}:-0.5")
    dtype = () if asked is None else ("--dtype", asked)
    assert export("merged", "--base", base, *loras, "--output", tmp_path / "m", *dtype) == FINISHED
    before, after = weights(base / "transformer"), weights(tmp_path / "m" / "transformer")
    changed, moved, lost = 0, 0.0, 0.0
    assert after.keys() == before.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in first:
            (a, b), (c, d) = first[module], second[module]
            exact = weight.double() + b.double() @ a.double() - 0.5 * d.double() @ c.double()
            changed += 1
            moved += float((exact - weight.double()).square().sum())
            lost += float((after[name].double() - exact).square().sum())
        else:
            exact = weight.double()
        assert after[name].dtype == torch.bfloat16
        # bf16 has 8 bits: an error of 2**-8 at most. The sum in fp32 is on the other side of a tie now and then
        assert ((after[name].double() - exact).abs() <= 1.001 * 2**-8 * exact.abs() + 1e-7).all()
        assert (after[name] != exact.to(torch.bfloat16)).double().mean() < 1e-3
    assert changed == len(first) == 28
    said = re.search(r"by (\d+\.\d+)% of what the LoRAs change", capsys.readouterr().out)
    assert said and float(said[1]) / 100 == pytest.approx((lost / moved) ** 0.5, abs=1e-4) and float(said[1]) > 0.1


def test_the_index_of_shards_is_right(tiny_base: Path, tmp_path: Path, lora: Path) -> None:
    base = sharded(tiny_base, tmp_path / "base", torch.float32)
    assert export("merged", "--base", base, "--lora", lora, "--output", tmp_path / "m", "--dtype", "bf16") == FINISHED
    folder = tmp_path / "m" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 2
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)
    assert index["metadata"]["total_size"] == sum(x.numel() * 2 for x in weights(folder).values())
    assert QwenImageTransformer2DModel.from_pretrained(folder).num_parameters() > 1000


def test_one_tensor_is_in_memory_at_a_time(
    tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(name: str, weight: Tensor, parts: Any) -> Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in seen))
        seen.append(weakref.ref(weight))
        return original(name, weight, parts)

    original = request.folded
    monkeypatch.setattr(request, "folded", watched)
    assert export("merged", "--base", tiny_base, "--lora", lora, "--output", tmp_path / "m") == FINISHED
    assert len(seen) > 50 and most <= 1  # that of the last call may wait for its successor


def test_it_is_told_what_was_merged(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    assert export("merged", "--base", tiny_base, "--lora", f"{lora}:0.7", "--output", tmp_path / "m") == FINISHED
    said = json.loads((tmp_path / "m" / "merged.json").read_text())
    loras = [{"file": str(lora), "sha256": content_hash(lora), "strength": 0.7}]
    assert said == {"base": str(tiny_base), "loras": loras}


def test_weights_are_shared_with_the_base_and_small_files_are_not(tiny_base: Path, lora: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    assert export("merged", "--base", base, "--lora", lora, "--output", tmp_path / "m") == FINISHED
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert os.path.samefile(base / part, tmp_path / "m" / part)
    for part in ("transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert not os.path.samefile(base / part, tmp_path / "m" / part)


def test_where_there_are_no_hard_links_all_is_copied(
    tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refused)
    assert export("merged", "--base", tiny_base, "--lora", lora, "--output", tmp_path / "m") == FINISHED
    assert {*tree(tmp_path / "m")} == {*tree(tiny_base), "merged.json"}


def test_all_that_is_wrong_is_told_at_once(tiny_base: Path, lora: Path, tmp_path: Path, caplog: Any) -> None:
    narrow = tmp_path / "narrow.safetensors"
    save_file({f"transformer_blocks.0.attn.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, narrow)
    broken = load_file(lora)
    broken[next(iter(broken))][0, 0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    (tmp_path / "there").mkdir()
    loras = [f"{lora}:strong", f"{lora}:0", tmp_path / "gone.safetensors", tmp_path / "nan.safetensors", narrow]
    words = [word for one in loras for word in ("--lora", one)]
    before = tree(tmp_path)
    assert export("merged", "--base", tiny_base, *words, "--output", tmp_path / "there") == BAD_INPUT
    for said in ('"strong" after the colon', "at strength 0", "gone.safetensors: there is no", "NaN", "exists already"):
        assert said in caplog.text
    assert export("merged", "--base", tiny_base, "--lora", narrow, "--output", narrow / "x") == BAD_INPUT
    assert (
        "was made for another model: 1 of its 1 modules do not fit; transformer_blocks.0.attn.to_q is 2 -> 2"
        in caplog.text
    )
    assert f"{narrow} is a file" in caplog.text
    assert tree(tmp_path) == before


def test_a_merged_base_is_not_merged_again(tiny_base: Path, lora: Path, tmp_path: Path, caplog: Any) -> None:
    assert export("merged", "--base", tiny_base, "--lora", f"{lora}:0.7", "--output", tmp_path / "m") == FINISHED
    assert export("merged", "--base", tmp_path / "m", "--lora", lora, "--output", tmp_path / "again") == BAD_INPUT
    assert "a.safetensors at strength 0.7 is in these weights already" in caplog.text
    assert f"give the base that it was made from ({tiny_base})" in caplog.text


def test_a_quantised_base_is_refused(tiny_base: Path, lora: Path, tmp_path: Path, caplog: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    about = json.loads((base / "transformer" / "config.json").read_text())
    write_json(base / "transformer" / "config.json", {**about, "quantization_config": {"quant_method": "torchao"}})
    assert export("merged", "--base", base, "--lora", lora, "--output", tmp_path / "m") == BAD_INPUT
    assert "is stored in torchao, to which nothing can be added exactly" in caplog.text


def test_a_base_from_a_configuration(run_toml: Path, lora: Path, tmp_path: Path, caplog: Any) -> None:
    assert export("merged", "--config", run_toml, "--lora", lora, "--output", tmp_path / "m") == FINISHED
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[model]\nbase = "no/such/folder"\ndtpye = "bf16"\n')
    assert export("merged", "--config", wrong, "--lora", lora, "--output", tmp_path / "m") == BAD_INPUT
    assert "dtpye" in caplog.text and "exists already" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_needs_a_gpu_is_refused_without_one(
    kind: str, tiny_base: Path, lora: Path, tmp_path: Path, caplog: Any
) -> None:
    asked = ("--base", tiny_base, "--lora", lora, "--output", tmp_path / "m", "--quantization", kind)
    assert export("merged", *asked) == BAD_INPUT
    assert "bitsandbytes quantises on a GPU" in caplog.text and not (tmp_path / "m").exists()


@pytest.mark.slow
def test_the_merged_base_in_fp8_opens_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    base, lora = Path("demo/model"), tmp_path / "loras" / "a.safetensors"
    random_lora(base, lora)
    for folder, kind in (("plain", "none"), ("fp8", "fp8")):
        asked = ("--base", base, "--lora", lora, "--output", tmp_path / folder, "--quantization", kind)
        assert export("merged", *asked, *(["--dtype", "bf16"] if kind == "none" else [])) == FINISHED
    plain, fp8 = tmp_path / "plain" / "transformer", tmp_path / "fp8" / "transformer"
    assert sum(x.stat().st_size for x in fp8.iterdir()) < 0.75 * sum(x.stat().st_size for x in plain.iterdir())
    layer = QwenImageTransformer2DModel.from_pretrained(fp8).transformer_blocks[0].attn.to_q
    assert type(layer.weight).__name__ == "Float8Tensor"
    exact = weights(plain)["transformer_blocks.0.attn.to_q.weight"].float()
    assert 1e-4 < (layer.weight.dequantize().float() - exact).norm() / exact.norm() < 0.05
    expected, found = (latents(folder.parent, dtype=torch.bfloat16).float() for folder in (plain, fp8))
    assert (found - expected).norm() / expected.norm() < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_merged_base_in_nf4_and_int8_opens_in_diffusers(kind: str, tmp_path: Path) -> None:
    lora = tmp_path / "a.safetensors"
    random_lora(Path("demo/model"), lora)
    asked = ("--base", "demo/model", "--lora", lora, "--output", tmp_path / "m", "--quantization", kind)
    assert export("merged", *asked) == FINISHED
    QwenImageTransformer2DModel.from_pretrained(tmp_path / "m" / "transformer")


def test_a_disk_that_is_too_small_is_told_before(
    tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    before = tree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert export("merged", "--base", tiny_base, "--lora", lora, "--output", tmp_path / "m") == BAD_INPUT
    assert "MB (its weights), and 1.0 MB are free there" in caplog.text
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_full_disk_leaves_nothing(
    at: int, tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    before, flush, calls = tree(tmp_path), trainer.files._flush, 0

    def full(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(trainer.files, "_flush", full)
    assert export("merged", "--base", tiny_base, "--lora", lora, "--output", tmp_path / "m") == FAILED
    assert "No space left on device" in caplog.text and str(tmp_path / "m") in caplog.text
    assert tree(tmp_path) == before


def test_an_interrupted_merge_leaves_nothing(
    tiny_base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, original, calls = tree(tmp_path), request.folded, 0

    def interrupted(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(request, "folded", interrupted)
    assert export("merged", "--base", tiny_base, "--lora", lora, "--output", tmp_path / "m") == FAILED
    assert calls == 20 and tree(tmp_path) == before


def test_what_a_precision_cannot_hold_is_refused(tiny_base: Path, tmp_path: Path, caplog: Any) -> None:
    lora = tmp_path / "a.safetensors"
    random_lora(tiny_base, lora)
    asked = ("--base", tiny_base, "--lora", f"{lora}:1e7", "--output", tmp_path / "m")
    assert export("merged", *asked, "--dtype", "fp16") == BAD_INPUT
    assert "has values that torch.float16 cannot hold" in caplog.text and not (tmp_path / "m").exists()
