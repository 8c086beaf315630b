"""Estimates of memory, against what PyTorch really keeps, and against arithmetic."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import train
from tests.helpers import BAD_INPUT, FINISHED
from trainer import adapter, qwen_image
from trainer.adapter import AdapterConfig
from trainer.hardware import memory
from trainer.hardware.live import fused_attention
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


def really_kept(train_config: TrainConfig, pixels: int, settings: AdapterConfig) -> int:
    """Bytes kept by a forward pass on the CPU, by the storages of its saved tensors, with the estimate's attention."""
    torch.manual_seed(0)
    transformer: Any = QwenImageTransformer2DModel(**SMALL)
    adapter.inject(transformer, settings)
    if train_config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    found, alive = dict[int, int](), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    side = round(pixels**0.5 / 16)
    batch = train_config.batch_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), fused_attention():
        latents, prompt = torch.randn(batch, 16, 1, 2 * side, 2 * side), torch.randn(batch, memory.PROMPT_TOKENS, 32)
        qwen_image.predict_velocity(transformer, latents, torch.rand(batch), prompt, None)
    return sum(found.values())


@pytest.mark.parametrize(("batch_size", "use_dora"), [(1, False), (3, False), (1, True)])
def test_activations_are_what_autograd_keeps(batch_size: int, use_dora: bool) -> None:
    settings, config = AdapterConfig(rank=4, use_dora=use_dora), TrainConfig(batch_size=batch_size)
    estimated = memory.activation_bytes(on_meta(**SMALL), FP32, config, 128**2, settings)
    assert estimated == pytest.approx(really_kept(config, 128**2, settings), rel=0.02)


def test_checkpointing_keeps_the_blocks_inputs_and_one_block() -> None:
    settings, plain = AdapterConfig(rank=4), TrainConfig()
    thrifty = replace(plain, gradient_checkpointing=True)
    whole = memory.activation_bytes(on_meta(**SMALL), FP32, plain, 128**2, settings)
    block = memory.activation_bytes(on_meta(**SMALL), FP32, plain, 128**2, settings, blocks=2)
    block -= memory.activation_bytes(on_meta(**SMALL), FP32, plain, 128**2, settings, blocks=1)
    estimated = memory.activation_bytes(on_meta(**SMALL), FP32, thrifty, 128**2, settings)
    assert estimated == pytest.approx(really_kept(thrifty, 128**2, settings) + block, rel=0.02)
    assert estimated < whole


def test_activations_grow_with_pixels_and_batch() -> None:
    def count(pixels: int = 256**2, **options: Any) -> float:
        return memory.activation_bytes(on_meta(**SMALL), BF16, TrainConfig(**options), pixels, AdapterConfig(rank=4))

    assert 3 < count(1024**2) / count(512**2) < 4.1  # not 4: captions do not grow
    assert 1.9 < count(batch_size=2) / count() < 2.1


def test_an_adapter_at_bf16_keeps_no_input_twice() -> None:
    """Raised to fp32, the inputs of q, k, v, out and MLP would be kept by themselves. In bf16 q, k and v share theirs,
    and that of out is kept by the attention anyway."""
    kept = []
    for raised in (True, False):
        block = memory.few_blocks(on_meta(), torch.bfloat16, AdapterConfig(), 1, torch.device("meta"))
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
    model = on_meta(**SMALL)
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - linear
    assert memory.weight_bytes(model, FP32) == 4 * (linear + rest)
    assert memory.weight_bytes(model, BF16) == 2 * (linear + rest)
    assert memory.weight_bytes(model, replace(BF16, quantization="int8")) == linear + 2 * rest
    assert memory.weight_bytes(model, replace(BF16, quantization="nf4")) == pytest.approx(0.5625 * linear + 2 * rest)


def test_fp8_needs_one_block_as_it_is_computed(tiny_base: Path) -> None:
    model, train_config = on_meta(**SMALL), TrainConfig(gradient_checkpointing=True)
    needs = memory.estimate(
        str(tiny_base), model, replace(BF16, quantization="fp8"), AdapterConfig(), train_config, 64**2
    )
    block = 2 * sum(p.numel() for p in model.transformer_blocks[0].parameters())
    assert needs.parts["one block cast"] == block
    assert needs.parts["weights"] == memory.weight_bytes(model, replace(BF16, quantization="int8"))


def test_offloaded_weights_leave_three_blocks_on_the_gpu(tiny_base: Path) -> None:
    model, train_config = on_meta(**{**SMALL, "num_layers": 9}), TrainConfig(gradient_checkpointing=True)
    needs = memory.estimate(str(tiny_base), model, BF16, AdapterConfig(), train_config, 64**2)
    offloaded = memory.offloaded_bytes(model, BF16, needs)
    block = 2 * sum(p.numel() for p in model.transformer_blocks[0].parameters())
    held = sum(value for name, value in needs.parts.items() if name != "activations")
    assert held == sum(memory.resident_bytes(model, BF16, AdapterConfig(), train_config).values())
    adapted = held - needs.parts["weights"]
    assert needs.stages["training"] - offloaded == pytest.approx(adapted + 6 * block)


def test_the_real_one() -> None:
    """Qwen-Image: 20.43 B parameters; 60 blocks without checkpointing keep tens of GB at 1024 x 1024."""
    model = on_meta()
    assert memory.weight_bytes(model, BF16) == pytest.approx(40.86e9, rel=0.001)
    whole = memory.activation_bytes(model, BF16, TrainConfig(), 1024**2, AdapterConfig())
    assert 30e9 < whole < 80e9
    thrifty = TrainConfig(gradient_checkpointing=True)
    assert memory.activation_bytes(model, BF16, thrifty, 1024**2, AdapterConfig()) < 4e9


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
    gradients = 4 * sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    estimated = memory.activation_bytes(on_meta(num_layers=10), BF16, config, 512**2, settings) + gradients
    assert estimated == pytest.approx(measured, rel=0.3)
