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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointConfig, CheckpointError
from trainer.choice import Choice, choose
from trainer.errors import Interrupted, TrainingError
from trainer.hardware import parallel
from trainer.optimizer import TrainConfig, learning_rate, lr_groups, make_optimizer
from trainer.tracking import Tracker

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Loss:
    value: Tensor
    """Scalar, attached to the graph."""
    batch: str
    """What was in the batch, for a message."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the value is made of, for the log: scalars, not attached."""


@dataclass(frozen=True)
class Measured:
    """What a validation has found."""

    values: Mapping[str, float] = field(default_factory=dict)
    """To be logged."""
    errors: Tensor | None = None
    """Errors that the best step is chosen by: N 8, of pictures at the sigmas of the stable loss, on the CPU."""
    of: tuple[str, ...] = ()
    """What the errors are of. Steps are compared as long as it is the same."""


class Objective(Protocol):
    module: nn.Module
    """Its parameters with `requires_grad` are trained. Replaced by the one that accelerate prepares."""

    def loss(self, step: int, micro_step: int) -> Loss: ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, besides the optimizer."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...

    def validate(self, step: int, tracker: Tracker) -> Measured:
        """Called at step 0, every `validate_every` steps and at the end. What takes long goes through `tracker.each`,
        so that the run can stop in between."""


@dataclass
class Result:
    step: int
    seconds: float
    """Training time of all parts of the run, without validation."""
    validations: list[dict[str, float]] = field(default_factory=list)
    errors: dict[int, Tensor] = field(default_factory=dict)
    """Step -> `Measured.errors`, of the steps that can be compared."""
    errors_of: tuple[str, ...] = ()
    chosen: Path | None = None
    """The checkpoint of the step that `choice` chooses; None if there are no errors to choose by."""

    @property
    def choice(self) -> Choice | None:
        return choose(self.errors)


@dataclass(frozen=True)
class Job:
    """What the loop must know of a run, besides its objective."""

    output: Path
    train: TrainConfig
    checkpoint: CheckpointConfig
    validate_every: int
    course: Mapping[str, Any] = field(default_factory=dict)
    """What must be the same when the run is resumed: see `checkpoint.course`."""
    patience: int = 0
    """The run ends when so many validations have brought no better step; 0: never before its last step."""
    rate: Callable[[int], float] | None = None
    """The learning rate of each update, from 0; None: that of `train`."""
    lr_factor: Callable[[str], float] = lambda name: 1.0
    """What the learning rate of a parameter, by its name, is multiplied by."""
    learns: Callable[[int, str], bool] = lambda step, name: True
    """Whether an update, from 0, changes a parameter."""
    validated: Callable[[Result], None] = lambda result: None
    """Called after each validation, on the first process."""


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
    That of the best step is kept until the end. Afterwards the objective has the weights of the last step; with an
    average, `[train] ema`, those of the average.
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
            if training.is_done:
                break
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
        training.finish()
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
        named = objective.module.named_parameters()
        self._parameters = {name.removeprefix("module."): p for name, p in named if p.requires_grad}
        self._optimizer: Any = make_optimizer(lr_groups(self._parameters, job.lr_factor), job.train)
        if accelerator.scaler is not None:  # accelerate's own optimizer looks for packages at each step
            self._optimizer = accelerator.prepare(self._optimizer)
        self._average = EMAModel([*self._parameters.values()], job.train.ema) if job.train.ema else None
        self.result, self._begin = Result(0, 0.0), time.monotonic()
        self._course, self._saved = _course(job, accelerator), Path()

    @property
    def _root(self) -> Path:
        return self._job.output / checkpoint.FOLDER

    @property
    def is_done(self) -> bool:
        """Whether the run has waited for a better step as long as it was told to."""
        choice, patience = self.result.choice, self._job.patience
        return bool(patience) and choice is not None and choice.waited >= patience

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        saved = latest(self._job, self._accelerator)
        if saved is None:
            return
        self._objective.load_tensors(saved.tensors)
        parallel.load_optimizer(self._optimizer, saved.optimizer)
        if self._average is not None:
            own = zip(self._average.shadow_params, self._parameters, strict=True)
            shadow = [parallel.sharded_like(saved.average[name], value) for value, name in own]
            own_state = {"shadow_params": shadow, "optimization_step": saved.state["averaged"]}
            self._average.load_state_dict({**self._average.state_dict(), **own_state})
        state = saved.state
        errors = {int(step): torch.tensor(values) for step, values in state["errors"].items()}
        self.result = Result(saved.step, state["seconds"], state["validations"], errors, tuple(state["errors_of"]))
        self._course, self._saved = saved.state["course"], saved.path  # it may know of models that are not here now
        self._note_choice()
        self._begin = time.monotonic() - self.result.seconds

    def update(self, step: int) -> dict[str, float]:
        """One optimizer update. Returns `loss`, `lr`, `grad_norm`, and what the loss is made of, if it has parts."""
        job = self._job
        lr = learning_rate(job.train, step) if job.rate is None else job.rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        losses, grad_norm = self._gradients(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.step(self._parameters.values())
        return {"loss": losses["loss"], "lr": lr, "grad_norm": grad_norm, **losses}

    def _gradients(self, step: int) -> tuple[dict[str, float], float]:
        """Compute those of an update, clipped; what does not learn has none. Returns the losses and the norm."""
        job, accelerator, optimizer = self._job, self._accelerator, self._optimizer
        while True:
            losses, batches = _backward(self._objective, job.train, accelerator, step)
            loss = losses["loss"]
            for name, parameter in self._parameters.items():
                if not job.learns(step, name):
                    parameter.grad = None
            if accelerator.scaler is not None:
                accelerator.unscale_gradients(optimizer)
            largest = job.train.max_grad_norm or math.inf
            norm = nn.utils.clip_grad_norm_([*self._parameters.values()], largest)
            grad_norm = float(parallel.unsharded(norm))
            if math.isfinite(loss) and math.isfinite(grad_norm):
                return losses, grad_norm
            if accelerator.scaler is None or not math.isfinite(loss) or accelerator.scaler.get_scale() < 1:
                raise TrainingError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, with {'; '.join(batches)}. "
                    "Nothing was updated. Look at these pictures and captions, lower the learning rate, or leave fp16."
                )
            accelerator.scaler.update(accelerator.scaler.get_scale() / 2)  # fp16 gradients overflowed: once more
            optimizer.zero_grad(set_to_none=True)

    def lacks_validation(self, step: int) -> bool:
        due = step % self._job.validate_every == 0 or step == self._job.train.steps
        return due and all(values["step"] != step for values in self.result.validations)

    def validate(self, step: int, tracker: Tracker) -> None:
        """Only after `save`, but for step 0, which is saved if it may be the best."""
        paused = time.monotonic()
        with torch.no_grad(), self._averaged():
            found = self._objective.validate(step, tracker)
        self._begin += time.monotonic() - paused
        if not found.values:
            return
        values = {**found.values, "seconds": round(time.monotonic() - self._begin, 3)}
        if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise TrainingError(
                f"validation after step {step}: {', '.join(bad)}. "
                + (f"Delete {self._saved} to resume before it. " if step else "")
                + 'A lower learning rate, or [model] dtype = "bf16" instead of fp16, may help.'
            )
        self.result.validations.append({"step": step, **values})
        if found.errors is not None:
            if found.of != self.result.errors_of and self.result.errors:
                tracker.warn("other held-out pictures than before: from step %d on the best step is chosen anew", step)
                self.result.errors.clear()
            self.result.errors[step], self.result.errors_of = found.errors, found.of
        tracker.scalars(step, values)
        main = self._accelerator.is_main_process
        if step == 0 and found.errors is not None:
            self.save(0)  # which knows of this validation: its line is written before
        elif step and main:
            checkpoint.add_to_state(self._saved, self._history())
        self._note_choice()
        if main:
            self._job.validated(self.result)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the parameters are the average, if there is one."""
        if self._average is None:
            yield
            return
        parameters = [*self._parameters.values()]
        self._average.store(parameters)
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            self._average.restore(parameters)

    def _note_choice(self) -> None:
        choice = self.result.choice
        self.result.chosen = None if choice is None else checkpoint.path_of(self._root, choice.step)
        if self.result.chosen is not None and not self.result.chosen.exists():
            raise CheckpointError(
                f"{self.result.chosen} is missing: it holds the best step of the run. Put it back, or choose another "
                "--output."
            )

    def _history(self) -> dict[str, Any]:
        errors = {str(step): values.tolist() for step, values in self.result.errors.items()}
        return {"validations": self.result.validations, "errors": errors, "errors_of": self.result.errors_of}

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
        average, averaged = None, None
        if self._average is not None:
            average = parallel.unsharded(dict(zip(self._parameters, self._average.shadow_params, strict=True)))
            averaged = self._average.optimization_step
        if self._accelerator.is_main_process:
            state = {"course": self._course, "seconds": result.seconds, "averaged": averaged, **self._history()}
            parts = checkpoint.Parts(tensors, optimizer, average)
            self._saved = checkpoint.save(self._root, step, parts, state, settings.keep, self.result.chosen)
        self._accelerator.wait_for_everyone()

    def finish(self) -> None:
        if self._average is not None:
            self._average.copy_to([*self._parameters.values()])


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
