"""How long a training step takes, and what of it is our loop.

The same steps are done twice, in turns: by the loop, with everything that it does, and bare, which is forward, backward
and optimizer on inputs that lie ready. Machines are noisy: the overhead is the median of the turns' ratios. Without
caches each step would encode its batch: what that takes is measured too.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trainer import loop, qwen_image, run
from trainer.adapter import AdapterWeights, Seed
from trainer.checkpoint import CheckpointConfig
from trainer.data.dataset import load_picture
from trainer.data.epoch import batch
from trainer.files import DTYPES
from trainer.hardware import machine
from trainer.hub import sources
from trainer.objective import LoraObjective, draw_prior, encode
from trainer.plan import Plan
from trainer.tracking import Tracker

TURNS = 9
WARMUP = 5  # steps of each turn that do not count


class _Clock:
    """Seconds between calls; on a GPU, of what it has finished."""

    def __init__(self, device: torch.device):
        self.device, self._last = device, 0.0
        self.laps: dict[str, list[float]] = {}

    def start(self) -> None:
        self._last = machine.now(self.device)

    def lap(self, name: str) -> None:
        now = machine.now(self.device)
        self.laps.setdefault(name, []).append(now - self._last)
        self._last = now


class _Watched:
    """The objective, with the time at which each step begins."""

    def __init__(self, objective: LoraObjective):
        self._objective, self.begins = objective, list[float]()
        self.module = objective.module

    def loss(self, step: int, micro_step: int) -> loop.Loss:
        if micro_step == 0:
            self.begins.append(time.perf_counter())
        return self._objective.loss(step, micro_step)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._objective.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self._objective.load_tensors(tensors)

    def validate(self, step: int, tracker: Tracker) -> loop.Measured:
        return loop.Measured()


def measure(prepared: Plan, accelerator: Accelerator, steps: int) -> dict[str, Any]:
    """Seconds of one step in the loop and bare, each part of it, the loop's overhead, and what caches save."""
    settings = prepared.config
    machine.check(prepared, accelerator.device)
    sources.fetch(prepared.needs)
    text_encoder = qwen_image.text_encoder(settings.model, accelerator.device)
    encoding = _encoding(prepared, accelerator.device, text_encoder)
    encoded = encode(prepared, accelerator.device, text_encoder, quiet=False)
    text_encoder.unload()
    transformer = qwen_image.load_transformer(settings.model, accelerator.device)
    draw_prior(prepared, transformer, encoded, accelerator, quiet=False)
    run.install(transformer, Seed(AdapterWeights({}), {}), settings.adapter, random_seed=settings.seed)
    qwen_image.set_up(
        transformer,
        settings.model,
        gradient_checkpointing=settings.train.gradient_checkpointing,
        offload_activations=settings.train.offload_activations,
    )
    objective = LoraObjective(prepared, transformer, encoded, accelerator)
    whole, laps = list[float](), list[dict[str, float]]()
    for _ in range(TURNS):
        whole.append(statistics.median(_by_the_loop(objective, prepared, accelerator, steps)))
        clock = _Clock(accelerator.device)
        _by_parts(objective, prepared, steps, clock)
        laps.append({name: statistics.median(values) for name, values in clock.laps.items()})
    medians = {name: statistics.median(turn[name] for turn in laps) for name in laps[0]}
    bare = [sum(turn[name] for name in ("forward", "backward", "optimizer")) for turn in laps]
    step = statistics.median(whole)
    pictures = settings.train.batch_size * settings.train.gradient_accumulation_steps
    uncached = step + settings.train.gradient_accumulation_steps * sum(encoding.values())
    return {
        "steps": TURNS * (steps - WARMUP),
        "seconds_in_the_loop": step,
        "seconds_bare": statistics.median(bare),
        "overhead_of_turns": [with_loop / without - 1 for with_loop, without in zip(whole, bare, strict=True)],
        "overhead": statistics.median(with_loop / without for with_loop, without in zip(whole, bare, strict=True)) - 1,
        "parts": medians,
        "pictures_per_second": pictures / step,
        "encoding": encoding,
        "pictures_per_second_without_caches": pictures / uncached,
        "peak_memory_bytes": machine.peak_memory(accelerator.device),
    }


def _encoding(prepared: Plan, device: torch.device, text_encoder: qwen_image.TextEncoder) -> dict[str, float]:
    """Seconds in which the VAE encodes the pictures of one batch, and the text encoder its captions, one by one as in a
    run."""
    settings, clock = prepared.config, _Clock(device)
    size, base = settings.train.batch_size, settings.model.base
    batches = [batch(prepared.dataset.train, size, seed=settings.seed, index=turn) for turn in range(TURNS + 1)]
    vae = qwen_image.load_vae(base, device)
    for examples in batches:
        clock.start()
        qwen_image.encode_pictures(vae, [load_picture(example) for example in examples])
        clock.lap("pictures")
    del vae
    encoder = qwen_image.PromptEncoder(text_encoder, DTYPES[settings.model.dtype])
    for examples in batches:
        clock.start()
        for example in examples:
            encoder([example.caption])
        clock.lap("captions")
    return {name: statistics.median(laps[1:]) for name, laps in clock.laps.items()}  # the first warms up


def _by_the_loop(objective: LoraObjective, prepared: Plan, accelerator: Any, steps: int) -> list[float]:
    """Seconds from the beginning of a step to that of the next. Neither validation nor checkpoints."""
    settings, watched = prepared.config.train, _Watched(objective)
    with tempfile.TemporaryDirectory() as folder:
        never = 10 * steps
        job = loop.Job(Path(folder), replace(settings, steps=steps + 1), CheckpointConfig(every=never), never)
        loop.train(watched, job, accelerator, quiet=True, nested=True)
    between = [after - before for before, after in zip(watched.begins, watched.begins[1:], strict=False)]
    return between[WARMUP:]


def _by_parts(objective: LoraObjective, prepared: Plan, steps: int, clock: _Clock) -> None:
    """The same, step by step, with a clock: data, forward, backward, optimizer, logging."""
    settings = prepared.config.train
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer, warm = loop.make_optimizer(parameters, settings), _Clock(clock.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        Tracker(Path(folder), steps=steps, quiet=True, nested=True) as tracker,
    ):
        for step in range(steps):
            now = clock if step >= WARMUP else warm
            now.start()
            inputs = objective.inputs(step, 0)
            now.lap("data")
            loss = objective.forward(inputs)
            now.lap("forward")
            loss.backward()
            now.lap("backward")
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now.lap("optimizer")
            values = {"loss": float(loss.detach()), "lr": settings.learning_rate, "grad_norm": 0.0}
            tracker.scalars(step + 1, values)
            tracker.progress(step + 1, values["loss"])
            now.lap("logging")


def report_text(report: dict[str, Any]) -> str:
    step, bare = (f"{1000 * report[name]:.2f} ms" for name in ("seconds_in_the_loop", "seconds_bare"))
    encoding = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in report["encoding"].items())
    turns = f"{min(report['overhead_of_turns']):.1%} to {max(report['overhead_of_turns']):.1%}"
    cached, uncached = report["pictures_per_second"], report["pictures_per_second_without_caches"]
    return "\n".join(
        [
            f"a step: {step} in the loop, {bare} bare (forward, backward, optimizer)",
            f"the loop: {report['overhead']:.1%} more, by the median of {TURNS} turns ({turns})",
            f"{cached:.1f} pictures a second; {uncached:.1f} without caches (encoding a batch: {encoding})",
            "parts (ms): " + ", ".join(f"{name} {1000 * value:.2f}" for name, value in report["parts"].items()),
        ]
    )
