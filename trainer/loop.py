"""The training loop: one for the LoRA run, the hypernetworks and the demo's pretraining alike.

What is trained, and on what, is an `Objective`. The loop owns the order of things: loss, backward, the check
for NaN *before* the update, clipping, update, logs, validation, checkpoint, and a clean stop on a signal.
"""

import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointConfig
from trainer.errors import Interrupted, TrainingError
from trainer.hardware import parallel
from trainer.tracking import Tracker

log = logging.getLogger("trainer")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`[train]`"""

    steps: int = 1000
    """The number of optimizer updates."""
    batch_size: int = 1
    """How many pictures a forward pass has, on each process."""
    gradient_accumulation_steps: int = 1
    """How many forward passes are added up for one update."""
    learning_rate: float = 3e-4
    """The learning rate after the warm-up. LoRAs are often trained with 1e-4 to 3e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: it stays, or falls to 0, in a line or along half a cosine."""
    warmup_steps: int = 0
    """The number of steps over which the learning rate rises in a line from 0."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW with moments in fp32, or in 8 bits by bitsandbytes. The paged one moves them to the CPU when the GPU's
    memory is short."""
    weight_decay: float = 0.01
    """How strongly AdamW pulls the adapter's weights to 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm. 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them. This needs much less memory, and about a third more
    time."""
    offload_activations: bool = False
    """Let what gradient checkpointing still keeps, the input of each block, wait in the CPU's memory."""

    def problems(self) -> list[str]:
        found = [f"{name} must be at least 1" for name in ("steps", "batch_size", "gradient_accumulation_steps")
                 if getattr(self, name) < 1]  # fmt: skip
        found += [f"{name} must not be negative" for name in ("warmup_steps", "weight_decay", "max_grad_norm")
                  if getattr(self, name) < 0]  # fmt: skip
        if not self.learning_rate > 0:
            found.append("learning_rate must be above 0")
        if self.offload_activations and not self.gradient_checkpointing:
            found.append("offload_activations needs gradient_checkpointing = true: it moves what checkpointing keeps")
        if self.warmup_steps >= self.steps:
            found.append(f"warmup_steps = {self.warmup_steps} leaves nothing of steps = {self.steps}")
        return found


@dataclass(frozen=True)
class Loss:
    value: Tensor
    """Scalar, attached to the graph."""
    batch: str
    """What was in the batch, for a message."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the value is made of, for the log: scalars, not attached."""


class Objective(Protocol):
    module: nn.Module
    """Its parameters with `requires_grad` are trained. Replaced by the one that accelerate prepares."""

    def loss(self, step: int, micro_step: int) -> Loss: ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, besides the optimizer."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...

    def validate(self, step: int, tracker: Tracker) -> dict[str, float]:
        """Numbers to log; called at step 0, every `validate_every` steps and at the end. What takes long goes through
        `tracker.each`, so that the run can stop in between."""


@dataclass
class Result:
    step: int
    seconds: float
    """Training time of all parts of the run, without validation."""
    validations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What the loop must know of a run, besides its objective."""

    output: Path
    train: TrainConfig
    checkpoint: CheckpointConfig
    validate_every: int
    course: Mapping[str, Any] = field(default_factory=dict)
    """What must be the same when the run is resumed: see `checkpoint.course`."""


def train(
    objective: Objective,
    job: Job,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    quiet: bool = False,
    nested: bool = False,
) -> Result:
    """Train to the last step; with `resume`, from the newest checkpoint on. nested: one run of many, see `Tracker`.

    A checkpoint is saved before each validation, so that one which is stopped is done again when the run is resumed.
    The loop divides the loss by the accumulation steps: `accelerator` must not be told of them, or it would, too.
    Raises TrainingError on NaN or infinity, Interrupted after a signal, CheckpointError if the checkpoint was
    written by a run of another course.
    """
    training = _Training(objective, job, accelerator)
    if resume:
        training.resume()
    start, steps, main = training.result.step, job.train.steps, accelerator.is_main_process
    alone = accelerator.num_processes == 1  # several stop together, after a step
    with (
        _stop_signals() as stop,
        Tracker(
            job.output,
            start_step=start,
            steps=steps,
            quiet=quiet,
            main=main,
            nested=nested,
            validate_again=training.lacks_validation(start),
            stopping=lambda: alone and bool(stop),
        ) as tracker,
        _said_at_once(),
    ):
        if training.lacks_validation(start):
            training.validate(start, tracker)
        for step in range(start, steps):
            values = training.update(step)
            done = step + 1
            tracker.scalars(done, values)
            tracker.progress(done, values["loss"])
            stopping, validating = _any_process(accelerator, bool(stop)), training.lacks_validation(done)
            if done % job.checkpoint.every == 0 or validating or stopping:
                training.save(done)
            if stopping:
                raise Interrupted(f"stopped after step {done}")
            if validating:
                training.validate(done, tracker)
    return training.result


def latest(job: Job, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to resume from, or None. CheckpointError if it is damaged, or of another course."""
    return checkpoint.latest(job.output / checkpoint.FOLDER, _course(job, accelerator))


def _course(job: Job, accelerator: Accelerator) -> dict[str, Any]:
    """The batches of a step may be divided otherwise when a run is resumed, as long as they are as many. Where the
    moments of 8-bit AdamW lie does not matter."""
    batches = job.train.gradient_accumulation_steps * accelerator.num_processes
    return {
        **job.course,
        "train.optimizer": job.train.optimizer.removeprefix("paged_"),
        "train.gradient_accumulation_steps x processes": batches,
    }


class _Training:
    """A training under way: its optimizer, and what came of it so far."""

    def __init__(self, objective: Objective, job: Job, accelerator: Accelerator):
        self._objective, self._job, self._accelerator = objective, job, accelerator
        if parallel.uses_fsdp():
            parallel.shard(objective.module, accelerator.device)
        else:
            objective.module = parallel.wrap_ddp(accelerator, objective.module)
        self._parameters = [p for p in objective.module.parameters() if p.requires_grad]
        self._optimizer: Any = make_optimizer(self._parameters, job.train)
        if accelerator.scaler is not None:  # accelerate's own optimizer looks for packages at each step
            self._optimizer = accelerator.prepare(self._optimizer)
        self.result, self._begin = Result(0, 0.0), time.monotonic()
        self._course, self._saved = _course(job, accelerator), Path()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        saved = latest(self._job, self._accelerator)
        if saved is None:
            return
        self._objective.load_tensors(saved.tensors)
        parallel.load_optimizer(self._optimizer, saved.optimizer)
        self.result = Result(saved.step, saved.state["seconds"], saved.state["validations"])
        self._course, self._saved = saved.state["course"], saved.path  # it may know of models that are not here now
        self._begin = time.monotonic() - self.result.seconds

    def update(self, step: int) -> dict[str, float]:
        return _update(self._objective, self._optimizer, self._parameters, self._job.train, self._accelerator, step)

    def lacks_validation(self, step: int) -> bool:
        due = step % self._job.validate_every == 0 or step == self._job.train.steps
        return due and all(values["step"] != step for values in self.result.validations)

    def validate(self, step: int, tracker: Tracker) -> None:
        """Only after `save`, but for step 0."""
        paused = time.monotonic()
        with torch.no_grad():
            values = self._objective.validate(step, tracker)
        self._begin += time.monotonic() - paused
        if not values:
            return
        values["seconds"] = round(time.monotonic() - self._begin, 3)
        if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"validation after step {step}: {', '.join(bad)}. "
                + (f"Delete {self._saved} to resume before it. " if step else "")
                + 'A lower learning rate, or [model] dtype = "bf16" instead of fp16, may help.'
            )
        self.result.validations.append({"step": step, **values})
        tracker.scalars(step, values)
        if step and self._accelerator.is_main_process:
            checkpoint.add_to_state(self._saved, {"validations": self.result.validations})

    def save(self, step: int) -> None:
        result, settings = self.result, self._job.checkpoint
        result.step, result.seconds = step, time.monotonic() - self._begin
        tensors = parallel.unsharded(self._objective.tensors())
        if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise TrainingError(
                f"step {step}: NaN or infinity in the weights, such as {bad[0]}: they are not saved. "
                "Lower the learning rate, or leave fp16."
            )
        optimizer = parallel.unsharded(self._optimizer.state_dict())
        if self._accelerator.is_main_process:
            state = {"course": self._course, "seconds": result.seconds, "validations": result.validations}
            root = self._job.output / checkpoint.FOLDER
            self._saved = checkpoint.save(root, step, tensors, optimizer, state, settings.keep)
        self._accelerator.wait_for_everyone()


def _update(
    objective: Objective,
    optimizer: Any,
    parameters: list[nn.Parameter],
    config: TrainConfig,
    accelerator: Accelerator,
    step: int,
) -> dict[str, float]:
    """One optimizer update. Returns `loss`, `lr`, `grad_norm`, and what the loss is made of, if it has parts."""
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    while True:
        losses, batches = _backward(objective, config, accelerator, step)
        loss = losses["loss"]
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(optimizer)
        grad_norm = float(parallel.unsharded(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            break
        if accelerator.scaler is None or not math.isfinite(loss) or accelerator.scaler.get_scale() < 1:
            raise TrainingError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, with {'; '.join(batches)}. "
                "Nothing was updated. Look at these pictures and captions, lower the learning rate, or leave fp16."
            )
        accelerator.scaler.update(accelerator.scaler.get_scale() / 2)  # fp16 gradients overflowed: once more
        optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm, **losses}


def _backward(
    objective: Objective, config: TrainConfig, accelerator: Accelerator, step: int
) -> tuple[dict[str, float], list[str]]:
    """Add up the gradients of all micro steps. Returns the mean `loss` with its parts, and what was in the batches."""
    means, batches = defaultdict[str, float](float), []
    for micro_step in range(config.gradient_accumulation_steps):
        last = micro_step == config.gradient_accumulation_steps - 1
        with nullcontext() if last else parallel.no_sync(accelerator, objective.module):
            loss = objective.loss(step, micro_step)
            accelerator.backward(loss.value / config.gradient_accumulation_steps)
        values = torch.stack([loss.value.detach(), *loss.parts.values()])  # the GPU is asked for all of them at once
        for name, value in zip(("loss", *loss.parts), accelerator.reduce(values, "mean").tolist(), strict=True):
            means[name] += value / config.gradient_accumulation_steps
        batches.append(loss.batch)
    return means, batches


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of update `step` (from 0): a line up over `warmup_steps`, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    match config.lr_schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    kind: Any = torch.optim.AdamW
    if config.optimizer != "adamw":
        import bitsandbytes  # its import probes for CUDA libraries: only where it is used

        kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
        kind = kinds[config.optimizer]
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


@contextmanager
def _said_at_once() -> Iterator[None]:
    """The launcher ends all processes as soon as one has ended: what happened is said before that."""
    try:
        yield
    except RuntimeError as error:
        if parallel.lost_a_process(error):
            log.error("another process of this run has ended; its own message is above")
        raise


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list, so that the step can finish; a second SIGINT stops at once."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("%s: finishing this step, then saving a checkpoint", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only the main one may ask for signals
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
