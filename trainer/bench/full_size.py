"""A training step of the real size with random weights.

A transformer of Qwen-Image's shape is written to the disk with random weights, 41 GB in bf16, and loaded as a real one
is. Each variant is timed: forward, backward and optimizer of a LoRA at 1024 x 1024; the peak of the GPU's memory beside
what --plan estimates; the arithmetic done in a second beside what the card does in plain matrix products. Without a GPU
a few blocks will do: --blocks 1 --resolution 256 --variants none fp8
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from trainer import adapter, flow, loop, qwen_image
from trainer.adapter import AdapterConfig
from trainer.files import random_tensors, size, stream_tensors, write_json
from trainer.hardware import machine, memory
from trainer.hardware.seconds import matmul_rate
from trainer.optimizer import TrainConfig
from trainer.qwen_image import ModelConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "none+compile": {"compile": True},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "nf4+compile": {"quantization": "nf4", "compile": True},
}
SHAPE: dict[str, Any] = {}  # the class's own defaults are Qwen-Image's
WARMUP = 2  # steps that do not count
TRAIN = TrainConfig(gradient_checkpointing=True)


def write_base(folder: Path, num_blocks: int, *, quiet: bool) -> None:
    """`folder/transformer` with random weights in bf16."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**SHAPE, num_layers=num_blocks)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = random_tensors(shapes, torch.bfloat16)
    shown = tqdm(tensors, "write a random base", total=len(shapes), unit="tensor", disable=quiet)
    stream_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", shapes, shown, torch.bfloat16)
    write_json(folder / "transformer" / "config.json", json.loads(model.to_json_string()))


def measure(base: Path, name: str, settings: AdapterConfig, pixels: int, steps: int) -> dict[str, Any]:
    """Seconds, arithmetic and memory of one variant."""
    accelerator = Accelerator()
    device, model = accelerator.device, ModelConfig(base=str(base), **VARIANTS[name])
    began = machine.now(device)
    transformer = qwen_image.load_transformer(model, device)
    adapter.inject(transformer, settings)
    qwen_image.set_up(transformer, model, gradient_checkpointing=TRAIN.gradient_checkpointing)
    transformer.train()
    loaded = machine.now(device) - began
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(parameters, TRAIN)
    step = _step(transformer, optimizer, pixels, device)
    with FlopCounterMode(display=False) as counter:  # without compile it would see nothing of compiled blocks
        if not model.compile:
            step()
    seconds = []
    for number in range(WARMUP + steps):
        if number == WARMUP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = machine.now(device)
        step()
        seconds.append(machine.now(device) - began)
    like = qwen_image.transformer_on_meta(str(base))
    needs = memory.resident_bytes(like, model, settings, TRAIN)
    activations = memory.step_bytes(like, model, TRAIN, settings, pixels) + memory.cast_bytes(like, model)
    return {
        "variant": name,
        "seconds_to_load": loaded,
        "seconds_first_step": seconds[0],
        "seconds_a_step": statistics.median(seconds[WARMUP:]),
        "flop": counter.get_total_flops(),
        "peak_bytes": machine.peak_memory(device),
        "estimated_bytes": sum(needs.values()) + activations,
    }


def _step(
    transformer: QwenImageTransformer2DModel, optimizer: torch.optim.Optimizer, pixels: int, device: torch.device
) -> Callable[[], None]:
    """Forward, backward and update on random inputs."""
    side, random = round(pixels**0.5 / 8), flow.generator("full size")
    latents = torch.randn(1, 16, 1, side, side, generator=random).to(device)
    prompt = torch.randn(1, memory.PROMPT_TOKENS, transformer.config["joint_attention_dim"], generator=random)
    noise, sigmas = torch.randn(latents.shape, generator=random).to(device), torch.full((1,), 0.5, device=device)
    noisy, prompt = flow.interpolate(latents, noise, sigmas).bfloat16(), prompt.to(device)

    def step() -> None:
        predicted = qwen_image.predict_velocity(transformer, noisy, sigmas, prompt, None)
        flow.losses(predicted, latents, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def report_text(report: dict[str, Any]) -> str:
    rate = report["matmul_flop_a_second"]
    flop = max((entry["flop"] for entry in report["variants"]), default=0)  # the same for all
    lines = [f"{report['hardware']['name']}: {rate / 1e12:.3g} TFLOP/s in a plain product"]
    for entry in report["variants"]:
        if "error" in entry:
            lines.append(f"{entry['variant']:<13} failed: {entry['error']}")
            continue
        done = flop / entry["seconds_a_step"]
        peak = f"peak {size(entry['peak_bytes']['gpu'])}, " if "gpu" in entry["peak_bytes"] else ""
        first, load = f"{entry['seconds_first_step']:.1f} s", f"{entry['seconds_to_load']:.0f} s"
        lines.append(
            f"{entry['variant']:<13} {entry['seconds_a_step']:.2f} s a step (the first {first}, loading {load}), "
            f"{done / 1e12:.3g} TFLOP/s ({done / rate:.0%}), {peak}estimated {size(entry['estimated_bytes'])}"
        )
    return "\n".join(lines)


def measure_variants(
    names: Sequence[str], *, num_blocks: int, resolution: int, rank: int, steps: int, folder: Path
) -> dict[str, Any]:
    """The report of all variants; those that cannot be run here are told in it. The weights are deleted again."""
    device, found = Accelerator().device, list[dict[str, Any]]()
    settings = AdapterConfig(rank=rank)
    with tempfile.TemporaryDirectory(prefix="random-base-", dir=folder) as base:
        write_base(Path(base), num_blocks, quiet=False)
        for name in names:
            try:
                found.append(measure(Path(base), name, settings, resolution**2, steps))
            except (RuntimeError, ImportError) as error:  # out of memory, no GPU: the others may still go
                found.append({"variant": name, "flop": 0, "error": str(error).splitlines()[0]})
            qwen_image.free_memory()
    return {
        "hardware": machine.hardware(device),
        "versions": machine.versions(),
        "matmul_flop_a_second": matmul_rate(device),
        "variants": found,
    }
