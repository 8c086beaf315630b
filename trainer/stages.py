"""`[[stages]]`: parts of a run, one after the other, that train other parameters, sigmas, sizes or rates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from trainer.adapter import TARGETS, matches
from trainer.config import first_few
from trainer.data.dataset import DataConfig, Example
from trainer.flow import FlowConfig
from trainer.optimizer import TrainConfig, learning_rate, schedule_problems

RATES = ("learning_rate", "lr_schedule", "warmup_steps", "decay_steps", "num_cycles", "min_lr_ratio")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """`[[stages]]`. What a stage leaves out it takes from [train], [flow], [data] and [prior]."""

    steps: int
    """The number of its optimizer updates. [train] steps is their sum, and is left out."""
    learning_rate: float | None = None
    """As in [train]; the warm-up and the schedule run over the stage's own steps."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "trapezoid"] | None = None
    """As in [train]."""
    warmup_steps: int | None = None
    """As in [train]."""
    decay_steps: int | None = None
    """As in [train]."""
    num_cycles: int | None = None
    """As in [train]."""
    min_lr_ratio: float | None = None
    """As in [train]."""
    target_modules: str | tuple[str, ...] | None = None
    """The module types that learn in this stage, as in [adapter]; the others keep what they have learned. They must
    have an adapter."""
    blocks: tuple[int, ...] | None = None
    """The transformer's blocks that learn in this stage, by their numbers from 0, such as [0, 3, 6]."""
    sigma_range: tuple[float, float] | None = None
    """As in [flow]."""
    resolution: int | tuple[int, ...] | None = None
    """As in [data], of all folders. Held-out pictures keep their size, so that losses can be compared."""
    mask_outside: float | None = None
    """As in [data]."""
    prior_weight: float | None = None
    """The weight of the prior, as in [prior]. 0: this stage has no prior."""

    def problems(self) -> list[str]:
        found = [] if self.steps >= 1 else ["steps must be at least 1"]
        if self.mask_outside is not None and not 0 <= self.mask_outside <= 1:
            found.append("mask_outside must be from 0 to 1")
        if self.prior_weight is not None and self.prior_weight < 0:
            found.append("prior_weight must not be negative")
        for name in ("target_modules", "blocks"):
            if getattr(self, name) in ((), ""):
                found.append(f"{name} must name at least one")
        return found


@dataclass(frozen=True)
class StagePlan:
    """A part of a run, with all that it takes from above."""

    begin: int
    end: int
    """The update after its last."""
    train: TrainConfig
    """Its steps are those of the stage."""
    flow: FlowConfig
    examples: tuple[Example, ...]
    mask_outside: float
    prior_weight: float
    learns: frozenset[str] | None
    """The modules that learn; None: all that have an adapter."""

    def rate(self, step: int) -> float:
        """The learning rate of an update of the run."""
        return learning_rate(self.train, step - self.begin)


def data_of(stage: StageConfig, data: DataConfig) -> DataConfig:
    """The pictures at the stage's resolution."""
    if stage.resolution is None:
        return data
    folders = tuple(replace(folder, resolution=None) for folder in data.folders)
    return replace(data, resolution=stage.resolution, folders=folders)


def train_of(stage: StageConfig, train: TrainConfig) -> TrainConfig:
    """A schedule of the stage's own does not take over what belongs to that of [train]."""
    own = {name: value for name in RATES if (value := getattr(stage, name)) is not None}
    if stage.lr_schedule not in (None, train.lr_schedule):
        own = {"decay_steps": None, "num_cycles": None, "min_lr_ratio": 0.0, **own}
    return replace(train, steps=stage.steps, **own)


def flow_of(stage: StageConfig, flow: FlowConfig) -> FlowConfig:
    return flow if stage.sigma_range is None else replace(flow, sigma_range=stage.sigma_range)


def learning_modules(stage: StageConfig, modules: Iterable[str]) -> frozenset[str] | None:
    """Those that learn in the stage, of all that have an adapter; None: all of them. ValueError if there are none."""
    if stage.target_modules is None and stage.blocks is None:
        return None
    kept, given = list(modules), stage.target_modules
    if given is not None:
        types = TARGETS.get(given, (given,)) if isinstance(given, str) else given
        if unknown := [kind for kind in types if not any(matches(name, kind) for name in kept)]:
            raise ValueError(f"target_modules: {first_few(unknown)}: no module of the adapter is called so")
        kept = [name for name in kept if any(matches(name, kind) for kind in types)]
    if stage.blocks is not None:
        numbers = {number: [name for name in kept if f".{number}." in name] for number in stage.blocks}
        if unknown := [str(number) for number, found in numbers.items() if not found]:
            raise ValueError(f"blocks: no module that learns is in block {first_few(unknown)}")
        kept = [name for found in numbers.values() for name in found]
    return frozenset(kept)


def problems(
    stages: Sequence[StageConfig], train: TrainConfig, flow: FlowConfig, modules: Mapping[str, object], has_prior: bool
) -> list[str]:
    """What is wrong with each stage beside what is above it. modules: those with an adapter; empty if not known."""
    found = []
    for number, stage in enumerate(stages):
        own = [*schedule_problems(train_of(stage, train)), *flow_of(stage, flow).problems()]
        if stage.prior_weight is not None and not has_prior:
            own.append("prior_weight has no effect without [prior]")
        try:
            if modules:
                learning_modules(stage, modules)
        except ValueError as error:
            own.append(str(error))
        found += [f"[stages.{number}] {problem}" for problem in own]
    return found


def describe(stage: StageConfig) -> str:
    """What is its own."""
    shown = [
        f"{field.name} {value if not isinstance(value, tuple) else ', '.join(f'{one}' for one in value)}"
        for field in fields(stage)
        if field.name != "steps" and (value := getattr(stage, field.name)) is not None
    ]
    return "; ".join(shown) or "as above"
