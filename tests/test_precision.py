"""How the base is held and computed: quantised, in fp8, with other attention, compiled; by whole runs of train.py."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.quantizers.bitsandbytes.bnb_quantizer as bnb_quantizer
import psutil
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

from tests.helpers import BAD_INPUT, FAILED, FINISHED, adapter_bytes, metrics, run
from trainer import adapter, loop, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights
from trainer.formats import read_lora, write_lora
from trainer.hardware import memory
from trainer.hardware.live import LiveBytes
from trainer.lowrank import LowRank, relative_difference
from trainer.qwen_image import ModelConfig

CPU = torch.device("cpu")
KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU before it quantises, and so do we; bitsandbytes itself works on a CPU."""
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda *_, **__: None)
    # in eval mode it would pack weights for a CPU's kernel that has no backward, and keep them so
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr("trainer.hardware.machine.check", lambda *_: None)


@pytest.fixture
def lora(tmp_path: Path, tiny_base: Path) -> Path:
    """A LoRA of the adapter's rank on all its modules."""
    modules = adapter.target_modules(qwen_image.transformer_on_meta(str(tiny_base)), AdapterConfig())
    random = torch.Generator().manual_seed(3)
    factors = {
        name: LowRank(torch.randn(4, i, generator=random) * 0.05, torch.randn(o, 4, generator=random) * 0.05)
        for name, (i, o) in modules.items()
    }
    write_lora(tmp_path / "start.safetensors", AdapterWeights(factors), {})
    return tmp_path / "start.safetensors"


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_base_is_seeded_trained_and_exported(
    kind: str, run_toml: Path, tiny_base: Path, lora: Path, tmp_path: Path, without_a_gpu: None
) -> None:
    loaded = qwen_image.load_transformer(ModelConfig(base=str(tiny_base), dtype="fp32", quantization=kind), CPU)  # type: ignore[arg-type]
    blocks = [layer for name, layer in loaded.named_modules() if isinstance(layer, nn.Linear) and ".attn." in name]
    assert {type(layer).__name__ for layer in blocks} == {KINDS[kind]}
    settings = (f"model.quantization={kind}", f"init.method={lora}", "export.layouts=['transformer']")
    still = (*settings, "train.learning_rate=1e-12", "train.weight_decay=0.0", "train.steps=1")
    assert run(run_toml, tmp_path / "still", *still) == FINISHED
    report = json.loads((tmp_path / "still" / "run.json").read_text())["init"]["applied"]
    assert report["seeded"] == 24 and report["random"] == 0 and report["largest_error"] < 1e-5
    exported = read_lora(tmp_path / "still" / "adapter" / "still-transformer.safetensors")[0].factors
    wanted = read_lora(lora)[0].factors
    assert exported.keys() == wanted.keys()
    assert max(relative_difference(wanted[name], exported[name]) for name in wanted) < 1e-5

    assert run(run_toml, tmp_path / "out", *settings) == FINISHED
    assert run(run_toml, tmp_path / "two", *settings, "train.steps=2") == FINISHED
    assert run(run_toml, tmp_path / "two", *settings, resume=True) == FINISHED
    whole, resumed = (
        adapter_bytes(tmp_path / name)["adapter_last/adapter_model.safetensors"] for name in ("out", "two")
    )
    assert whole == resumed
    trained = read_lora(tmp_path / "out" / "adapter" / "out-transformer.safetensors")[0].factors
    moved = [relative_difference(wanted[name], trained[name]) for name in wanted]
    assert sum(change > 1e-3 for change in moved) >= 20
    assert run(run_toml, tmp_path / "plain", *still, "model.quantization=none") == FINISHED
    plain, quantised = (metrics(tmp_path / name)[0]["val_loss"] for name in ("plain", "still"))
    assert plain != quantised and plain == pytest.approx(quantised, rel=0.1)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_what_is_named_stays_whole(kind: Any, tiny_base: Path, without_a_gpu: None) -> None:
    """By default what comes in and goes out and the modulations; and memory counts the same layers."""

    def whole(**options: Any) -> set[str]:
        config = ModelConfig(base=str(tiny_base), quantization=kind, keep_quantized=False, **options)
        layers = [
            (name, layer)
            for name, layer in qwen_image.load_transformer(config, CPU).named_modules()
            if isinstance(layer, nn.Linear)
        ]
        found = {name for name, layer in layers if type(layer.weight) is nn.Parameter}
        assert len(layers) - len(found) == len(
            memory.quantised_layers(qwen_image.transformer_on_meta(str(tiny_base)), config)
        )
        return found

    assert {name.split(".")[0] for name in whole()} - {"transformer_blocks"} == set(qwen_image.LEFT_WHOLE[:5])
    assert all("_mod." in name for name in whole() if "blocks" in name)
    assert len([name for name in whole() if "_mod." in name]) == 4
    assert whole(quantization_skip=("proj_out", "transformer_blocks.1.img_mod")) == {
        "proj_out",
        "transformer_blocks.1.img_mod.1",
    }


def test_a_module_to_skip_that_is_not_there_is_told(
    run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(run_toml, tmp_path / "out", "model.quantization_skip=['img_mods']") == BAD_INPUT
    assert 'quantization_skip: "img_mods" is in the name of no linear layer' in caplog.text


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_kept_for_the_next_start(
    kind: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_a_gpu: None
) -> None:
    monkeypatch.setattr(qwen_image, "cache_folder", lambda: tmp_path / "cache")
    config = ModelConfig(base=str(tiny_base), quantization=kind)
    first = qwen_image.load_transformer(config, CPU).state_dict()
    (kept,) = (tmp_path / "cache" / "quantized").iterdir()
    monkeypatch.setattr(qwen_image, "_quantising", lambda _: pytest.fail("quantised again"))
    second = qwen_image.load_transformer(config, CPU).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], Tensor))
    with pytest.raises(pytest.fail.Exception, match="quantised again"):
        qwen_image.load_transformer(replace(config, quantization_skip=()), CPU)
    with pytest.raises(pytest.fail.Exception, match="quantised again"):
        qwen_image.load_transformer(replace(config, keep_quantized=False), CPU)

    stored = tmp_path / "stored"  # a base that others have quantised
    shutil.copytree(tiny_base, stored)
    shutil.rmtree(stored / "transformer")
    shutil.copytree(kept, stored / "transformer")
    assert qwen_image.stored_quantization(str(stored)) == kind
    assert qwen_image.stored_quantization(str(tiny_base)) is None
    third = qwen_image.load_transformer(replace(config, base=str(stored)), CPU).state_dict()
    assert all(torch.equal(first[name], third[name]) for name in first if isinstance(first[name], Tensor))


def test_a_base_that_is_stored_quantised_must_be_named_so(
    run_toml: Path, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    file = base / "transformer" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    assert run(run_toml, tmp_path / "out", f"model.base={base}") == BAD_INPUT
    assert 'the base is stored in "nf4"; set it to "nf4"' in caplog.text


def test_what_cannot_be_kept_is_no_reason_to_stop(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    without_a_gpu: None,
) -> None:
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setattr(qwen_image, "cache_folder", lambda: tmp_path / "cache")
    qwen_image.load_transformer(ModelConfig(base=str(tiny_base), quantization="nf4"), CPU)
    assert "the quantised base could not be kept in" in caplog.text


def test_fp8_only_stores_the_weights(tiny_base: Path) -> None:
    """Loss and gradients are those of a base with the weights that fp8 and its scales give back."""

    def prepared(quantization: Any, like: Any = None) -> Any:
        transformer: Any = qwen_image.load_transformer(
            ModelConfig(base=str(tiny_base), dtype="bf16", quantization=quantization), CPU
        )
        for name, parameter in transformer.named_parameters():
            if like is not None and name in like:
                parameter.data = like[name]
        adapter.inject(transformer, AdapterConfig(rank=4))
        for name, parameter in adapter.tensors(transformer).items():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        transformer.enable_gradient_checkpointing()
        return transformer.train()

    random = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 16, 1, 8, 8, generator=random), torch.randn(2, 5, 64, generator=random)

    def gradients(transformer: Any) -> tuple[Tensor, dict[str, Tensor]]:
        sigmas = torch.tensor([0.3, 0.7])
        velocity = qwen_image.predict_velocity(transformer, latents.bfloat16(), sigmas, prompt, None)
        loss = velocity.float().square().mean()
        loss.backward()
        found = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
        return loss.detach(), found

    weights = {
        name: (layer.weight.dequantize(), layer.weight.qdata.dtype)
        for name, layer in qwen_image.load_transformer(
            ModelConfig(base=str(tiny_base), quantization="fp8"), CPU
        ).named_modules()
        if type(getattr(layer, "weight", None)).__name__ == "Float8Tensor"
    }
    assert len(weights) == 24 and {dtype for _, dtype in weights.values()} == {torch.float8_e4m3fn}
    like = {f"{name}.weight": weight for name, (weight, _) in weights.items()}
    (loss, found), (expected_loss, expected) = gradients(prepared("fp8")), gradients(prepared("none", like))
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-3) and len(found) == len(expected) > 30
    for name in expected:  # both round to bf16 on their way
        assert (found[name] - expected[name]).norm() <= 0.03 * expected[name].norm()


def test_a_run_in_fp8(run_toml: Path, tmp_path: Path, lora: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ("model.quantization=fp8", "model.dtype=bf16", f"init.method={lora}")
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    assert '"fp8" saves nothing without [train] gradient_checkpointing = true' in caplog.text
    assert run(run_toml, tmp_path / "out", *settings, "train.gradient_checkpointing=true") == FINISHED
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["init"]["applied"]["seeded"] == 24 and report["init"]["applied"]["largest_error"] < 1e-5


def test_another_attention_gives_the_same(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    used = []
    original = nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **options: Any) -> Tensor:
        used.append(torch.backends.cuda.flash_sdp_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    curves = []
    for name in ("_native_math", "native"):  # the first must not be left in the process
        used.clear()
        assert run(run_toml, tmp_path / name, f"model.attention={name}", "validation.prompts=[]") == FINISHED
        curves.append([line["loss"] for line in metrics(tmp_path / name) if "loss" in line])
        assert used and all(used) == (name == "native")  # the other one allows the plain kernel only
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
def test_each_block_is_compiled(run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo but not translated to C++, which takes a minute."""
    compiled, original = list[str](), nn.Module.compile

    def traced(module: nn.Module, *arguments: Any, **options: Any) -> None:
        compiled.append(type(module).__name__)
        original(module, *arguments, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", traced)
    torch._dynamo.reset()
    settings = ("validation.prompts=[]", "init.method=gaussian", "train.gradient_checkpointing=true")
    assert run(run_toml, tmp_path / "plain", *settings) == FINISHED
    assert compiled == []
    assert run(run_toml, tmp_path / "compiled", *settings, "model.compile=true") == FINISHED
    assert compiled == ["QwenImageTransformerBlock"] * 2
    curves = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("plain", "compiled")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_what_needs_a_gpu_is_told_at_once(run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ("model.quantization=nf4", "model.dtype=fp16", "train.optimizer=paged_adamw8bit", "model.attention=flex")
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    for word in ('"nf4"', '"fp16"', '"paged_adamw8bit"', '"flex"'):
        assert f"{word} needs a CUDA GPU, and there is none here" in caplog.text
    assert not (tmp_path / "out").exists()


def test_fp8_without_its_package_is_told(
    run_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "torchao" and real(name, *rest)) or None
    )
    settings = ("model.quantization=fp8", "train.gradient_checkpointing=true")
    assert run(run_toml, tmp_path / "out", *settings) == BAD_INPUT
    assert '"fp8" needs torchao: pip install -e ".[fp8]"' in caplog.text


def test_attention_without_its_package_is_told(tiny_base: Path) -> None:
    config = ModelConfig(base=str(tiny_base), dtype="fp32", attention="flash_varlen")
    with pytest.raises(qwen_image.ModelError, match=r'attention: "flash_varlen" cannot be used here: .*flash-attn'):
        qwen_image.load_transformer(config, CPU)


def test_a_base_that_memory_cannot_hold_is_told_before_it_is_loaded(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Small:
        total = 100_000

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    monkeypatch.setattr(QwenImageTransformer2DModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert run(run_toml, tmp_path / "out") == BAD_INPUT
    assert "there is no GPU, the CPU has 0.1 MB. --plan --vram GB lists settings" in caplog.text


def test_memory_that_runs_out_while_training_is_told(
    run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "_backward", full)
    assert run(run_toml, tmp_path / "out") == FAILED
    assert "the GPU's memory is full" in caplog.text and "--plan --vram GB" in caplog.text


def test_pictures_are_decoded_in_tiles_where_there_is_no_room(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = qwen_image.load_vae(str(tiny_base), CPU)
    latents = torch.randn(1, 16, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    whole = qwen_image.decode_latents(vae, latents)[0]
    assert not vae.use_tiling
    asked = []
    monkeypatch.setattr(qwen_image, "fits", lambda num_bytes, device: asked.append(num_bytes))
    tiled = qwen_image.decode_latents(vae, latents)[0]
    assert vae.use_tiling and tiled.size == whole.size == (384, 384)
    assert asked == [qwen_image.decoding_bytes(vae, 48, 48)]


def test_one_frame_is_decoded_without_what_the_next_would_need() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()  # as published
        latents, picture = torch.empty(1, 16, 1, 128, 128), torch.empty(1, 3, 1, 1024, 1024)
    with torch.no_grad(), LiveBytes() as decoding:
        vae.decode(latents)
    with torch.no_grad(), LiveBytes() as encoding:
        vae.encode(picture)
    assert qwen_image.decoding_bytes(vae, 128, 128) < 0.4 * decoding.peak
    assert qwen_image.encoding_bytes(vae, 1024, 1024) < 0.5 * encoding.peak
    assert qwen_image.decoding_bytes(vae, 128, 128) == pytest.approx(2.84e9, rel=0.01)


def test_a_frame_is_equal_to_the_bit_without_it(tiny_base: Path) -> None:
    vae = qwen_image.load_vae(str(tiny_base), CPU)
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = vae.decode(latents * std + mean).sample
        ours = vae.decoder(vae.post_quant_conv(latents * std + mean)).clamp(-1, 1)
        assert torch.equal(ours, theirs)
        assert torch.equal(vae.quant_conv(vae.encoder(theirs)).chunk(2, dim=1)[0], vae.encode(theirs).latent_dist.mean)
