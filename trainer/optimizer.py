"""`[train]`: how weights are updated. The learning rate of each step, and the optimizer."""

import importlib
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from trainer.config import first_few

Groups = Sequence[nn.Parameter] | Sequence[dict[str, Any]]
BUILT_IN = ("adamw", "adamw8bit", "paged_adamw8bit")
OWN_KEYS = ("lr", "weight_decay")  # options of an optimizer that have keys of their own in [train]


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
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "trapezoid"] = "constant"
    """What the learning rate does after the warm-up. constant: it stays. linear: it falls in a line. cosine: it falls
    along half a cosine. cosine_with_restarts: `num_cycles` of these, one after the other. trapezoid: it stays, and
    falls in a line over the last `decay_steps`."""
    warmup_steps: int = 0
    """The number of steps over which the learning rate rises in a line from 0."""
    decay_steps: int | None = None
    """The number of steps at the end over which a trapezoid falls. Only with lr_schedule = "trapezoid"."""
    num_cycles: int | None = None
    """How often the cosine begins anew. Only with lr_schedule = "cosine_with_restarts"."""
    min_lr_ratio: float = 0.0
    """The share of the learning rate that the schedule ends with: 0 falls to nothing, 0.1 to a tenth."""
    optimizer: str = "adamw"
    """"adamw": AdamW with moments in fp32, fused where torch has it. "adamw8bit": with moments in 8 bits, by
    bitsandbytes. "paged_adamw8bit" moves them to the CPU when the GPU's memory is short. Or the import path of any
    torch optimizer, such as "torch.optim.Muon", "prodigyopt.Prodigy" or "pytorch_optimizer.CAME"."""
    optimizer_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Options of an optimizer that is given by its import path, by the names that its class has for them."""
    weight_decay: float = 0.01
    """How strongly the optimizer pulls the adapter's weights to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How slowly AdamW's averages of gradients and of their squares move."""
    eps: float = 1e-8
    """What AdamW adds to the divisor, so that it is not 0."""
    ema: float = 0.0
    """Above 0, an exponential moving average of the adapter with this decay, such as 0.99, is what is validated and
    exported. It moves faster during the first steps: its decay is at most (1 + n) / (10 + n) after n + 1 of them."""
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
        found += [f"{name} must not be negative" for name in ("weight_decay", "max_grad_norm")
                  if getattr(self, name) < 0]  # fmt: skip
        if self.offload_activations and not self.gradient_checkpointing:
            found.append("offload_activations needs gradient_checkpointing = true: it moves what checkpointing keeps")
        if not 0 <= self.ema < 1:
            found.append(f"ema must be at least 0 and below 1, not {self.ema:g}")
        return [*found, *schedule_problems(self), *_optimizer_problems(self)]


def schedule_problems(config: TrainConfig) -> list[str]:
    """What is wrong with the learning rate over the steps."""
    found = [] if config.learning_rate > 0 else ["learning_rate must be above 0"]
    if config.warmup_steps < 0:
        found.append("warmup_steps must not be negative")
    if config.warmup_steps >= config.steps:
        found.append(f"warmup_steps = {config.warmup_steps} leaves nothing of steps = {config.steps}")
    if not 0 <= config.min_lr_ratio <= 1:
        found.append(f"min_lr_ratio must be between 0 and 1, not {config.min_lr_ratio:g}")
    if config.min_lr_ratio and config.lr_schedule == "constant":
        found.append('min_lr_ratio has no effect with lr_schedule = "constant"')
    for name, schedule in (("decay_steps", "trapezoid"), ("num_cycles", "cosine_with_restarts")):
        value, needed = getattr(config, name), config.lr_schedule == schedule
        if value is None and needed:
            found.append(f'lr_schedule = "{schedule}" needs {name}')
        elif value is not None and not needed:
            found.append(f'{name} has no effect with lr_schedule = "{config.lr_schedule}"; it needs "{schedule}"')
        elif value is not None and value < 1:
            found.append(f"{name} must be at least 1")
    after = config.steps - config.warmup_steps
    if config.decay_steps is not None and config.decay_steps > after > 0:
        found.append(f"decay_steps = {config.decay_steps} are more than the {after} steps after the warm-up")
    return found


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of update `step` (from 0): a line up over `warmup_steps`, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    after, length = step - config.warmup_steps, max(config.steps - config.warmup_steps, 1)
    match config.lr_schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - after / length
        case "cosine":
            share = _cosine(after / length)
        case "cosine_with_restarts":
            assert config.num_cycles is not None
            share = _cosine(after / length * config.num_cycles % 1) if after < length else 0.0
        case "trapezoid":
            assert config.decay_steps is not None
            share = min(1.0, (length - after) / config.decay_steps)
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """parameters: themselves, or groups of them as torch's optimizers take them."""
    if config.optimizer not in BUILT_IN:
        kind, decay = find_optimizer(config.optimizer), {"weight_decay": config.weight_decay}
        has_decay = "weight_decay" in inspect.signature(kind).parameters
        options = {name: _tuples(value) for name, value in config.optimizer_options.items()}
        return kind(parameters, lr=config.learning_rate, **options, **(decay if has_decay else {}))
    shared: dict[str, Any] = {
        "lr": config.learning_rate, "weight_decay": config.weight_decay, "betas": config.betas, "eps": config.eps
    }  # fmt: skip
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=_can_be_fused(parameters), **shared)
    import bitsandbytes  # its import probes for CUDA libraries: only where it is used

    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[config.optimizer](parameters, **shared)


def _can_be_fused(parameters: Groups) -> bool | None:
    """None leaves it to torch."""
    each = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
    return True if all(parameter.device.type == "cuda" for parameter in each) else None


def find_optimizer(path: str) -> Any:
    """The class of that import path. ValueError says what is wrong with it."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{module} cannot be imported ({error}); install it: pip install {package}") from error
    if found is None:
        near = get_close_matches(name, vars(importlib.import_module(module)), n=1)
        raise ValueError(f"{module} has no {name}" + (f"; did you mean {module}.{near[0]}?" if near else ""))
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"{path} is no torch optimizer")
    return found


def _optimizer_problems(config: TrainConfig) -> list[str]:
    if config.optimizer in BUILT_IN:
        found = [f"betas must be at least 0 and below 1, not {beta:g}" for beta in config.betas if not 0 <= beta < 1]
        found += [] if config.eps > 0 else [f"eps must be above 0, not {config.eps:g}"]
        if config.optimizer_options:
            found.append(
                f'optimizer_options are of an optimizer given by its import path; "{config.optimizer}" has '
                "[train] betas, eps and weight_decay"
            )
        return found
    if "." not in config.optimizer:
        near = get_close_matches(config.optimizer, BUILT_IN, n=1)
        advice = f'; did you mean "{near[0]}"?' if near else ""
        known = ", ".join(BUILT_IN)
        return [f'optimizer: "{config.optimizer}" is not {known}, or the import path of a torch optimizer{advice}']
    plain = TrainConfig.__dataclass_fields__
    found = [
        f"{name} has no effect with {config.optimizer}: give it in [train.optimizer_options]"
        for name in ("betas", "eps")
        if getattr(config, name) != plain[name].default
    ]
    try:
        return found + _problems_of_class(config, find_optimizer(config.optimizer))
    except ValueError as error:
        return [*found, f"optimizer: {error}"]


def _problems_of_class(config: TrainConfig, kind: Any) -> list[str]:
    """The options against the class's own names, then by making one of it: it checks their values itself."""
    known = inspect.signature(kind).parameters
    named = [name for name, one in known.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)][1:]
    found = []
    for name in config.optimizer_options:
        if name in OWN_KEYS:
            own = {"lr": "learning_rate"}.get(name, name)
            found.append(f"optimizer_options: {name} is [train] {own}")
        elif name not in named:
            near = get_close_matches(name, named, n=1)
            advice = f"did you mean {near[0]}?" if near else f"it has {first_few(named, count=20)}"
            found.append(f"optimizer_options: {config.optimizer} has no {name}; {advice}")
    if "weight_decay" not in named and config.weight_decay:
        found.append(f"weight_decay: {config.optimizer} has none; set it to 0")
    step = inspect.signature(kind.step).parameters.get("closure")
    if step is not None and step.default is step.empty:
        found.append(f"optimizer: {config.optimizer} computes the loss several times a step, which is not supported")
    if found:
        return found
    try:
        with redirect_stdout(io.StringIO()):  # some greet
            made = make_optimizer([nn.Parameter(torch.zeros(2, 2))], config)
    except Exception as error:  # whatever the class says of its options
        return [f"optimizer_options: {config.optimizer}: {error}"]
    if callable(getattr(made, "train", None)):
        found.append(
            f"optimizer: {config.optimizer} must be switched between training and validation, which is not supported; "
            "[train] ema is an average, too"
        )
    return found


def _tuples(value: Any) -> Any:
    """Lists as tuples, which is what optimizers compare betas with."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def lr_groups(named: Mapping[str, nn.Parameter], factor: Callable[[str], float]) -> list[dict[str, Any]]:
    """Groups for `make_optimizer`: parameters by what their learning rate is multiplied by, told as `lr_factor`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(factor(name), []).append(parameter)
    return [{"params": group, "lr_factor": value} for value, group in groups.items()]
