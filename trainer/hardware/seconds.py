"""How long a run takes, before anything is loaded: estimates.

The arithmetic of a forward pass and of a step is counted on the meta device, with one block and with two. It is divided
by what a GPU computes in a second: what it was measured to do in one large product, or what a data sheet promises; of
either only a share is reached, and that share is a guess. What is loaded is divided by the disk's speed. Nothing counts
that the cache may hold already.
"""

import math
import mmap
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from trainer import qwen_image, validation
from trainer.adapter import AdapterConfig, Stage, Work
from trainer.data.prior import Prior
from trainer.errors import UserError
from trainer.files import DTYPES
from trainer.hardware import machine, memory
from trainer.hub import sources
from trainer.optimizer import TrainConfig
from trainer.plan import Plan, facts, pixels, prior_pixels
from trainer.tracking import duration

SHARE_OF_PEAK = 0.35  # a guess
SHARE_OF_PRODUCT = 0.4  # of what one large product reaches, which is itself below the peak: a guess
CPU_FLOP = 0.5e12  # a second, where an encoder does not fit on the GPU: a guess
LINK = 16e9  # bytes a second from the CPU's memory to the GPU, of blocks that lie there: a guess
DISK = 2e9  # bytes a second, if the speed is neither told nor measured
TEMPLATE_TOKENS = 34  # around a caption
READ_AT_ONCE = 16 * 2**20  # bytes


@dataclass(frozen=True)
class Card:
    """As on NVIDIA's data sheets."""

    name: str
    gigabytes: float
    teraflops: float
    """A second, in dense bf16 products with sums in fp32."""


CARDS = (
    Card("B200", 180, 2250),
    Card("H200", 141, 989),
    Card("H100", 80, 989),
    Card("H100 PCIe", 80, 756),
    Card("A100", 80, 312),
    Card("A100 40GB", 40, 312),
    Card("RTX PRO 6000", 96, 504),
    Card("RTX 6000 Ada", 48, 364),
    Card("L40S", 48, 362),
    Card("RTX A6000", 48, 155),
    Card("RTX 5090", 32, 209.5),
    Card("RTX 4090", 24, 165),
    Card("A10", 24, 125),
    Card("L4", 24, 121),
    Card("RTX 3090 Ti", 24, 80),
    Card("RTX 3090", 24, 71),
    Card("RTX 5080", 16, 112.6),
    Card("RTX 4080 Super", 16, 104),
    Card("RTX 4080", 16, 97.5),
    Card("RTX 4070 Ti Super", 16, 88),
    Card("RTX 5070 Ti", 16, 87.9),
    Card("RTX 4060 Ti 16GB", 16, 44),
    Card("RTX 5070", 12, 61.7),
    Card("RTX 4070", 12, 58),
    Card("RTX 3060", 12, 25.5),
)


def card(name: str) -> Card:
    """The card of that name, however it is spelt: "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090"."""
    for one in CARDS:
        if _plain(one.name) == _plain(name):
            return one
    raise UserError(f'--card: "{name}" is not known; known are {", ".join(one.name for one in CARDS)}')


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second, and in words how that is known."""

    flop: float
    disk: float
    gigabytes: float
    """On the GPU."""
    told: str = ""


@dataclass(frozen=True)
class Workload:
    """What a run reads and computes. Arithmetic is in FLOP."""

    num_bytes: float
    """The base's, read once."""
    captions: Stage
    pictures: float
    start: Work
    forward: float
    """A forward pass with one picture."""
    step: float
    copied: float
    """Bytes of blocks that come from the CPU's memory in a forward pass."""
    copies_a_step: int
    validation_passes: int
    decoding: float
    """The sample pictures of a validation."""
    validations: int
    steps: int
    drawing_passes: int = 0
    """Forward passes by which the base draws pictures for the prior."""
    first_passes: int = 0
    """Those of the frozen base, which only the first validation has."""


@dataclass(frozen=True)
class Seconds:
    """A run's time."""

    before: Mapping[str, float]
    """What comes before the first step."""
    step: float
    validation: float
    validations: int
    steps: int

    @property
    def first_step(self) -> float:
        return sum(self.before.values())

    @property
    def total(self) -> float:
        return self.first_step + self.steps * self.step + (self.validations - 1) * self.validation

    @property
    def validating(self) -> float:
        """The share of the whole run."""
        return self.validations * self.validation / self.total


def estimate(work: Workload, speed: Speed) -> Seconds:
    """An encoder that does not fit on the GPU computes on the CPU."""

    def encoding(stage: Stage) -> float:
        fits = stage.num_bytes + memory.CONTEXT_BYTES <= memory.usable(speed.gigabytes)
        return stage.flop / (speed.flop if fits else CPU_FLOP)

    copying = work.copied / LINK  # while others compute
    forward = max(work.forward / speed.flop, copying)
    validating = work.validation_passes * forward + work.decoding / speed.flop
    before = {
        "reading models": (work.num_bytes + work.start.num_bytes) / speed.disk,
        "encoding captions and pictures": encoding(work.captions) + work.pictures / speed.flop,
        "predicting the start": sum(map(encoding, work.start.stages)),
        "trying strengths": work.start.passes * forward,
        "drawing the prior": work.drawing_passes * forward,
        "the first validation": validating + work.first_passes * forward,
    }
    step = max(work.step / speed.flop, work.copies_a_step * copying)
    return Seconds(before, step, validating, work.validations, work.steps)


def count(plan: Plan) -> Workload:
    """What a run does that finds nothing in the cache."""
    run, data, base = plan.config, plan.dataset, plan.config.model.base
    prior, side, number = plan.prior, pixels(plan), sum(len(e.buckets) for e in data.train) + len(data.held_out)
    captions = sum(len(e.captions) for e in data.train) + len(data.held_out)
    if prior:
        number += sum(len(e.buckets) for e in prior.pictures)
        captions += len(prior.texts)
    settings, like, blocks = run.adapter, plan.transformer, plan.transformer.transformer_blocks
    encoding, decoding = vae_flop(base, side)
    text = qwen_image.text_encoder_bytes(base)
    text_loaded = memory.with_activations(qwen_image.text_encoder_bytes(base, run.model.text_encoder_quantization))
    checks, shown = run.validation, len(run.validation.prompts)
    unrelated = len(checks.unrelated_prompts)
    tokens = (captions + shown + unrelated) * (TEMPLATE_TOKENS + memory.PROMPT_TOKENS)
    looked_at = [min(checks.num_pictures, len(part)) for part in (data.train, data.held_out)]
    drawing = shown * checks.num_inference_steps * (2 if checks.true_cfg_scale > 1 else 1)
    one = TrainConfig(gradient_checkpointing=run.train.gradient_checkpointing)
    step = transformer_flop(like, settings, run.train, side, backward=True)
    copies = 2  # forward, and again in the backward pass
    if prior:
        step += transformer_flop(like, settings, run.train, prior_pixels(plan), backward=True)
        copies += 2
    if prior and prior.config.method == "prediction":  # the base's own
        step += transformer_flop(like, settings, run.train, side, backward=False)
        copies += 1
    return Workload(
        num_bytes=text + _transformer_bytes(plan),
        captions=Stage("encoding captions", text_loaded, flop=text * tokens),
        pictures=number * encoding,
        start=plan.start.work(facts(run, data)),
        forward=transformer_flop(like, settings, one, side, backward=False),
        step=step * run.train.gradient_accumulation_steps,
        copied=min(run.model.offload_blocks, len(blocks)) * memory.weight_bytes(blocks[-1], run.model),
        copies_a_step=copies * run.train.gradient_accumulation_steps,
        validation_passes=(sum(looked_at) + unrelated) * validation.NUM_SIGMAS + drawing,
        decoding=shown * decoding,
        validations=math.ceil(run.train.steps / checks.every) + 1,
        steps=run.train.steps,
        drawing_passes=_drawing_passes(prior),
        first_passes=(2 * len(data.train) * checks.diagnose + unrelated) * validation.NUM_SIGMAS + unrelated,
    )


def _drawing_passes(prior: Prior | None) -> int:
    if prior is None:
        return 0
    guided = 2 if prior.config.true_cfg_scale > 1 else 1
    return len(prior.drawn) * prior.config.num_inference_steps * guided


def _transformer_bytes(plan: Plan) -> float:
    """Those of the files on this machine, else of the shape in the model's precision."""
    files = [path.stat().st_size for path in _weights(plan) if path.parent.name == "transformer"]
    each = DTYPES[plan.config.model.dtype].itemsize
    return float(sum(files) or each * sum(p.numel() for p in plan.transformer.parameters()))


def transformer_flop(
    like: QwenImageTransformer2DModel, settings: AdapterConfig, train: TrainConfig, side: int, *, backward: bool
) -> float:
    """FLOP of a batch of square pictures of so many pixels; with `backward` those of a step."""
    shape, sizes = memory.shape_of(like), (train.batch_size, side)
    thrifty = train.gradient_checkpointing and backward
    one, two = (_flop(shape, settings, sizes, blocks, thrifty, backward) for blocks in (1, 2))
    return one + (int(like.config["num_layers"]) - 1) * (two - one)


@lru_cache
def _flop(
    shape: str, settings: AdapterConfig, sizes: tuple[int, int], blocks: int, thrifty: bool, backward: bool
) -> int:
    """Counted on the meta device. sizes: the batch's, and pixels of a picture; thrifty: with gradient checkpointing."""
    transformer: Any = memory.few_blocks(shape, torch.bfloat16, settings, blocks, torch.device("meta"))
    if thrifty:
        transformer.enable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        velocity = memory.forward(transformer, *sizes, of_input=False)
        if backward:
            velocity.sum().backward()
    return counter.get_total_flops()


def vae_flop(base: str, side: int) -> tuple[float, float]:
    """FLOP of encoding and of decoding a square picture of so many pixels, twice: it is in fp32, which is computed in
    TF32, at half the rate of bf16."""
    config = qwen_image.part_config(AutoencoderKLQwenImage, base, "vae")
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLQwenImage(**config)
        size = round(side**0.5)
        small = size // 2 ** len(vae.config["temperal_downsample"])
        with FlopCounterMode(display=False) as encoding:
            vae.quant_conv(vae.encoder(torch.empty(1, 3, 1, size, size)))
        with FlopCounterMode(display=False) as decoding:
            vae.decoder(vae.post_quant_conv(torch.empty(1, vae.config["z_dim"], 1, small, small)))
    return 2.0 * encoding.get_total_flops(), 2.0 * decoding.get_total_flops()


# --- the machine ---------------------------------------------------------------------------------------------------


def speed_of(plan: Plan, chosen: Card | None, disk: float | None) -> Speed | None:
    """What the card does, else the GPU at hand; None if there is none. disk: GB a second, else measured."""
    if chosen:
        flop, gigabytes = SHARE_OF_PEAK * chosen.teraflops * 1e12, chosen.gigabytes
        told = f"{chosen.name} at {SHARE_OF_PEAK:.0%} of its peak of {chosen.teraflops:g} TFLOP/s, which is a guess"
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        measured = matmul_rate(device)
        flop, gigabytes = SHARE_OF_PRODUCT * measured, torch.cuda.get_device_properties(device).total_memory / 1e9
        told = (
            f"{torch.cuda.get_device_name(device)} at {SHARE_OF_PRODUCT:.0%}, which is a guess, of the "
            f"{measured / 1e12:.0f} TFLOP/s that it was measured to do in one large product"
        )
    else:
        return None
    if disk is not None:
        return Speed(flop, 1e9 * disk, gigabytes, f"{told}; a disk of {disk:g} GB/s, as told")
    rate = disk_rate(_weights(plan))
    how = "measured" if rate else "assumed (--disk tells it)"
    return Speed(flop, rate or DISK, gigabytes, f"{told}; a disk of {(rate or DISK) / 1e9:.1f} GB/s, {how}")


def _weights(plan: Plan) -> list[Path]:
    """The files of weights on this machine that the run loads."""
    found = {path for need in plan.needs if (where := sources.folder(need.source)) for file in need.files
             for path in where.glob(file) if path.suffix == ".safetensors"}  # fmt: skip
    return sorted(found)


def matmul_rate(device: torch.device) -> float:
    """FLOP a second of one large product in bf16."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        began = machine.now(device)
        a @ a
        seconds.append(machine.now(device) - began)
    return 2 * side**3 / statistics.median(seconds)


def disk_rate(files: Iterable[Path], seconds: float = 1.0) -> float | None:
    """Bytes a second of reading these files for so long, past the page cache where the system can; None if there is
    little to read."""
    began, done, buffer = time.perf_counter(), 0, mmap.mmap(-1, READ_AT_ONCE)
    for path in files:
        with _unbuffered(path) as file:
            while (read := file.readinto(buffer)) and time.perf_counter() - began < seconds:
                done += read
    return done / (time.perf_counter() - began) if done >= 4 * READ_AT_ONCE else None


def _unbuffered(path: Path) -> Any:
    """The file to read, without the page cache where the system can."""
    plain = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        return open(os.open(path, plain | getattr(os, "O_DIRECT", 0)), "rb", buffering=0)
    except OSError:  # some file systems cannot
        return open(os.open(path, plain), "rb", buffering=0)


# --- in words ------------------------------------------------------------------------------------------------------


def text(plan: Plan, chosen: Card | None = None, disk: float | None = None) -> str:
    """For `--plan`."""
    speed = speed_of(plan, chosen, disk)
    if speed is None:
        return 'seconds      there is no GPU here; --card "RTX 4090" estimates them for that card'
    work = count(plan)
    found = estimate(work, speed)
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in found.before.items() if seconds >= 1)
    passes = work.validation_passes
    return "\n".join(
        f"seconds      {line}"
        for line in (
            f"to the first step {duration(found.first_step)}: {stages}",
            f"a step {found.step:.2g} s ({work.step / 1e12:.1f} TFLOP), a validation {duration(found.validation)} "
            f"({passes} forward passes of {work.forward / 1e12:.1f} TFLOP)",
            f"in all {duration(found.total)}; {found.validations} validations are {found.validating:.1%} of it",
            f"estimated, with nothing in the cache, for {speed.told}",
        )
    )
