"""Estimates of memory, against what PyTorch really keeps, and against arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.lora import LoraLayer
from torch import nn

import train
from tests.helpers import BAD_INPUT, FINISHED
from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig, Stage, Work
from trainer.hardware import memory
from trainer.hardware.live import LiveBytes, fused_attention
from trainer.loop import TrainConfig
from trainer.qwen_image import ModelConfig

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 32,
    "in_channels": 64,
    "axes_dims_rope": (8, 12, 12),
}
FP32, BF16 = ModelConfig(base="x/y", dtype="fp32"), ModelConfig(base="x/y")


def on_meta(**options: Any) -> QwenImageTransformer2DModel:
    with torch.device("meta"):
        return QwenImageTransformer2DModel(**options)


def request(model: ModelConfig, train_config: TrainConfig, pixels: int = 64**2, **options: Any) -> memory.Request:
    transformer = options.pop("transformer", None) or on_meta(**SMALL)
    settings = options.pop("adapter", AdapterConfig(rank=4))
    return memory.Request(
        transformer=transformer, model=model, adapter=settings, train=train_config, pixels=pixels, **options
    )


def on_the_cpu(train_config: TrainConfig, pixels: int, settings: AdapterConfig, backward: bool) -> int:
    """The peak of a real pass on the CPU, with the estimate's attention."""
    torch.manual_seed(0)
    transformer: Any = QwenImageTransformer2DModel(**SMALL)
    adapter.inject(transformer, settings)
    if train_config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train(backward)
    side, batch = round(pixels**0.5 / 16), train_config.batch_size
    latents, prompt = torch.randn(batch, 16, 1, 2 * side, 2 * side), torch.randn(batch, memory.PROMPT_TOKENS, 32)
    with fused_attention(), torch.set_grad_enabled(backward), LiveBytes("cpu") as counted:
        velocity = qwen_image.predict_velocity(transformer, latents, torch.rand(batch), prompt, None)
        if backward:
            (velocity - torch.randn_like(velocity)).square().mean().backward()
    return counted.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch_size", "use_dora"), [(1, False), (3, False), (1, True)])
def test_a_step_is_what_a_step_on_the_cpu_makes(checkpointing: bool, batch_size: int, use_dora: bool) -> None:
    settings = AdapterConfig(rank=4, use_dora=use_dora)
    config = TrainConfig(batch_size=batch_size, gradient_checkpointing=checkpointing)
    estimated = memory.step_bytes(on_meta(**SMALL), FP32, config, settings, 128**2)
    assert estimated == pytest.approx(on_the_cpu(config, 128**2, settings, True), rel=0.06)
    without = memory.pass_bytes(on_meta(**SMALL), FP32, settings, batch_size, 128**2)
    assert without == pytest.approx(on_the_cpu(config, 128**2, settings, False), rel=0.06)
    assert without < estimated


def test_checkpointing_makes_less_and_accumulation_keeps_the_gradients() -> None:
    def count(**options: Any) -> float:
        return memory.step_bytes(on_meta(**SMALL), FP32, TrainConfig(**options), AdapterConfig(rank=4), 128**2)

    assert count(gradient_checkpointing=True) < count()
    trained = sum(4 * (a + b) for a, b in adapter.target_modules(on_meta(**SMALL), AdapterConfig(rank=4)).values())
    assert count(gradient_accumulation_steps=2) - count() == 4 * trained


def test_activations_grow_with_pixels_and_batch() -> None:
    def count(pixels: int = 256**2, **options: Any) -> float:
        return memory.step_bytes(on_meta(**SMALL), BF16, TrainConfig(**options), AdapterConfig(rank=4), pixels)

    assert 3 < count(1024**2) / count(512**2) < 4.1  # not 4: captions do not grow
    assert 1.8 < count(batch_size=2) / count() < 2.1


def test_an_adapter_at_bf16_keeps_no_input_twice() -> None:
    """Raised to fp32, the inputs of q, k, v, out and MLP would be kept by themselves. In bf16 q, k and v share theirs,
    and that of out is kept by the attention anyway."""
    kept = []
    for raised in (True, False):
        block = memory.few_blocks(memory.shape_of(on_meta()), torch.bfloat16, AdapterConfig(), 1, torch.device("meta"))
        for layer in block.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = raised
        with memory.kept_by_autograd(block) as found, fused_attention():
            memory.forward(block, 1, 1024**2, of_input=False)
        kept.append(sum(found.values()))
    tokens = 64 * 64 + memory.PROMPT_TOKENS
    expected = 4 * tokens * (4 * 3072 + 12288) - 2 * tokens * (3072 + 12288)
    assert kept[0] - kept[1] == pytest.approx(expected, rel=0.02)


def test_weights_are_arithmetic() -> None:
    model, whole = on_meta(**SMALL), replace(BF16, quantization_skip=())
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    assert memory.weight_bytes(model, FP32) == 4 * (linear + rest)
    assert memory.weight_bytes(model, BF16) == 2 * (linear + rest)
    assert memory.weight_bytes(model, replace(whole, quantization="int8")) == linear + 2 * rest
    assert memory.weight_bytes(model, replace(whole, quantization="nf4")) == pytest.approx(0.5625 * linear + 2 * rest)


def test_what_is_left_whole_counts_as_such() -> None:
    model, nf4 = on_meta(**SMALL), replace(BF16, quantization="nf4")
    whole = memory.weight_bytes(model, replace(nf4, quantization_skip=()))
    modulations = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "_mod." in name
    )
    skipped = memory.weight_bytes(model, replace(nf4, quantization_skip=("img_mod", "txt_mod")))
    assert skipped - whole == pytest.approx((2 - 0.5625) * modulations)


def test_quantised_weights_are_alive_as_they_are_computed(tiny_base: Path) -> None:
    model, train_config = on_meta(**SMALL), TrainConfig(gradient_checkpointing=True)
    block = sum(
        layer.weight.numel()
        for name, layer in model.transformer_blocks[0].named_modules()
        if isinstance(layer, nn.Linear) and "_mod." not in name
    )
    base = replace(BF16, base=str(tiny_base))
    for quantization, expected in (("fp8", 2 * block), ("nf4", 2 * 64 * 256), ("none", None)):
        needs = memory.estimate(request(replace(base, quantization=quantization), train_config))
        assert needs.parts.get("weights as they are computed") == expected


def test_offloaded_weights_leave_three_blocks_on_the_gpu(tiny_base: Path) -> None:
    model, train_config = on_meta(**{**SMALL, "num_layers": 9}), TrainConfig(gradient_checkpointing=True)
    needs = memory.estimate(request(replace(BF16, base=str(tiny_base)), train_config, transformer=model))
    offloaded = memory.offloaded_bytes(model, BF16, needs)
    block = 2 * sum(p.numel() for p in model.transformer_blocks[0].parameters())
    held = sum(value for name, value in needs.parts.items() if name != "activations and gradients")
    assert held == sum(memory.resident_bytes(model, BF16, AdapterConfig(rank=4), train_config).values())
    adapted = held - needs.parts["weights"]
    assert needs.stage("training").num_bytes - offloaded == pytest.approx(adapted + 6 * block)


def test_each_stage_is_what_is_there_then(tiny_base: Path) -> None:
    """The start's own stages, the whole prediction while it is tried, and where it stays beside the adapter."""
    base, train_config = replace(FP32, base=str(tiny_base)), TrainConfig()
    plain = memory.estimate(request(base, train_config, draws=False))
    assert [stage.name for stage in plain.stages] == ["encoding pictures", "encoding captions", "training"]
    start = Work(passes=8, numbers=1000, stays=True, stages=(Stage("encoding by it", 5e12, 0.0, "on the CPU"),))
    needs = memory.estimate(request(base, train_config, start=start))
    names = (
        "encoding pictures,encoding captions,encoding by it,trying strengths,training,drawing samples,decoding samples"
    )
    assert [stage.name for stage in needs.stages] == names.split(",")
    assert needs.stage("training").num_bytes == plain.stage("training").num_bytes + 4 * 1000
    model = on_meta(**SMALL)
    tried = (
        memory.weight_bytes(model, FP32) + 4 * 1000 + memory.pass_bytes(model, FP32, AdapterConfig(rank=4), 1, 64**2)
    )
    assert needs.stage("trying strengths").num_bytes == tried + memory.CONTEXT_BYTES
    assert needs.peak < 5e12  # it can be done on the CPU
    assert needs.stage("encoding by it").least == memory.CONTEXT_BYTES


def test_the_real_one() -> None:
    """Qwen-Image: 20.43 B parameters; 60 blocks without checkpointing keep tens of GB at 1024 x 1024."""
    model = on_meta()
    assert memory.weight_bytes(model, BF16) == pytest.approx(40.86e9, rel=0.001)
    whole = memory.step_bytes(model, BF16, TrainConfig(), AdapterConfig(), 1024**2)
    assert 30e9 < whole < 80e9
    thrifty = TrainConfig(gradient_checkpointing=True)
    assert memory.step_bytes(model, BF16, thrifty, AdapterConfig(), 1024**2) < 4e9


def test_plan_names_the_settings_that_fit(run_toml: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["--config", str(run_toml), "--plan"]
    assert train.main([*base, "--vram", "24"]) == FINISHED
    shown = capsys.readouterr().out
    assert "on a card with 24 GB" in shown and shown.rstrip().splitlines()[-1].endswith("as it is")
    assert "while training: weights" in shown and "activations" in shown
    assert train.main([*base, "--vram", "0.5"]) == FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert "nothing here fits" in lines[-2] and any("--set train.gradient_checkpointing=true" in line for line in lines)
    assert "does not fit" in lines[-1] and "fsdp2_offload.yaml" in lines[-1]
    for wrong in (["--vram", "24"], ["--plan", "--vram", "0"]):
        with pytest.raises(SystemExit) as stop:
            train.main(["--config", str(run_toml), *wrong])
        assert stop.value.code == BAD_INPUT


def test_a_text_encoder_too_large_for_the_card_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_base: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16e9, 24e9))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    with caplog.at_level("INFO", logger="trainer"):
        assert qwen_image.device_with_room(10e9, gpu, "it") == gpu and not caplog.text
        assert qwen_image.device_with_room(16.6e9, gpu, "it") == cpu and "16.6 GB" in caplog.text
    assert qwen_image.device_with_room(16.6e9, cpu, "it") == cpu
    size = sum(p.stat().st_size for p in (tiny_base / "text_encoder").glob("*.safetensors"))
    assert qwen_image.text_encoder_bytes(str(tiny_base)) == size and size > 0
    assert qwen_image.text_encoder_bytes("Qwen/Qwen-Image") == 16.6e9


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_what_a_gpu_allocates(checkpointing: bool) -> None:
    """Ten blocks of full width, 512 x 512, bf16: forward and backward."""
    device = torch.device("cuda")
    with torch.device(device):
        transformer: Any = QwenImageTransformer2DModel(num_layers=10)
    transformer = transformer.to(torch.bfloat16)
    settings, config = AdapterConfig(), TrainConfig(gradient_checkpointing=checkpointing)
    adapter.inject(transformer, settings)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    latents = torch.randn(1, 16, 1, 64, 64, device=device, dtype=torch.bfloat16)
    prompt = torch.randn(1, memory.PROMPT_TOKENS, 3584, device=device, dtype=torch.bfloat16)
    velocity = qwen_image.predict_velocity(transformer, latents, torch.rand(1, device=device), prompt, None)
    velocity.square().mean().backward()
    measured = torch.cuda.max_memory_allocated() - before
    estimated = memory.step_bytes(on_meta(num_layers=10), BF16, config, settings, 512**2)
    assert estimated == pytest.approx(measured, rel=0.3)
