"""The LoRA, LoHa or LoKr on the transformer, through PEFT: inject, seed, verify the seed, read back.

Everywhere outside this file factors are *effective*: dW = b a. PEFT multiplies b a by its scale (alpha / rank, or
alpha / sqrt(rank) with rslora), so here, and only here, a seed is divided by the scale and what is read is multiplied.
What LoHa and LoKr are made of is in `trainer.lycoris`.
"""

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer import lycoris
from trainer.config import first_few
from trainer.errors import UserError
from trainer.flow import generator
from trainer.hardware.parallel import sharded_like
from trainer.hardware.threads import parallel_map
from trainer.lowrank import LowRank, energy, energy_kept, pad, rank, relative_difference, truncate, zeros

NAME = "default"  # of the adapter in PEFT
NAMED = 5  # names in `rank_pattern` without effect that an error gives with what is near
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
"""The adapters that can be trained, as `[adapter] kind` and in words."""
TOLERANCE = 1e-5  # of `verify`: fp32 rounds at 6e-8, a wrong scale or a swapped module is off by far more

_IMAGE_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_TEXT_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_ATTENTION = (*_IMAGE_ATTENTION, *_TEXT_ATTENTION)
_I2L = (*_ATTENTION, "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1", "txt_mod.1")
TARGETS: dict[str, tuple[str, ...]] = {
    "i2l": _I2L,
    "all": (*_I2L, "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    "attention": _ATTENTION,
    "diffusers": _IMAGE_ATTENTION,
}
"""Sets of module types by name: the 12 that i2L predicts, all 14 of a block, both attentions, diffusers' default."""


class AdapterError(UserError):
    """An adapter cannot be made, seeded or restored as asked."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`[adapter]`"""

    kind: Literal["lora", "loha", "lokr"] = "lora"
    """"lora"; "loha", the elementwise product of two low-rank matrices, with twice as many parameters at a rank; or
    "lokr", a Kronecker product of two small matrices. The last two need an unquantised base, and diffusers cannot read
    them. A LoHa of a large rank takes memory and time, since it forms the whole change of each layer's weights."""
    rank: int = 16
    """The rank of the LoRA, or of each product of a LoHa; of a LoKr that of its larger matrix, which is whole where the
    rank is at least half of its side. 16 to 32 is common; a larger one can learn more, and overfits sooner."""
    alpha: float | None = None
    """The effect of the adapter is alpha / rank times its product. By default alpha is the rank (with use_rslora its
    square root), so that the scale is 1. A seed keeps its effect whatever alpha is."""
    dropout: float = 0.0
    """The probability that an input of the adapter is set to zero while training."""
    target_modules: str | tuple[str, ...] = "i2l"
    """"i2l" (the 12 module types that i2L covers), "all" (14), "attention" (8), "diffusers" (4: its default), or a list
    of module types or names, such as ["attn.to_q", "transformer_blocks.0.img_mod.1"]."""
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    """Layers with a rank of their own, by their whole name: "transformer_blocks.0.attn.to_q" = 4. If alpha is not set,
    their scale is 1, too."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA, arXiv:2312.03732). It matters only
    with alpha set: by default the scale is 1 either way."""
    use_dora: bool = False
    """Train the magnitude and the direction of the weights separately (DoRA, arXiv:2402.09353). Slower, and most other
    programs cannot read the result."""
    lokr_factor: int = -1
    """How a LoKr divides the sides of a layer: its smaller matrix has at most this many rows and columns. -1 divides
    each side as evenly as can be, which takes the fewest parameters."""
    lora_plus_ratio: float = 1.0
    """The learning rate of b is that of a times this (LoRA+, arXiv:2402.12354, which proposes 16 for a random start
    with a lower learning rate). 1 is the same for both."""

    def problems(self) -> list[str]:
        found = self._without_effect()
        if self.lokr_factor < 1 and self.lokr_factor != -1:
            found.append(f"lokr_factor must be at least 1, or -1, not {self.lokr_factor}")
        if not self.lora_plus_ratio > 0:
            found.append(f"lora_plus_ratio must be above 0, not {self.lora_plus_ratio:g}")
        if self.rank < 1:
            found.append(f"rank must be at least 1, not {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            found.append(f"alpha must be above 0, not {self.alpha}: at 0 the adapter would have no effect")
        found += [f"rank_pattern: {name} must be at least 1" for name, rank in self.rank_pattern.items() if rank < 1]
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if isinstance(self.target_modules, str):
            if self.target_modules not in TARGETS:
                found.append(
                    f'target_modules: there is no set "{self.target_modules}", only {", ".join(TARGETS)}; '
                    f'for single module types give a list: ["{self.target_modules}"]'
                )
        elif not self.target_modules or not all(self.target_modules):
            found.append("target_modules must name at least one module type, and no empty one")
        return found

    def _without_effect(self) -> list[str]:
        """A problem for each key that is set and does nothing for this kind of adapter."""
        defaults = {"dropout": 0.0, "use_rslora": False, "use_dora": False, "lora_plus_ratio": 1.0}
        if self.kind == "lora":
            defaults = {}
        if self.kind != "lokr":
            defaults["lokr_factor"] = -1
        unused = [name for name, value in defaults.items() if getattr(self, name) != value]
        return [f'{name} has no effect with kind = "{self.kind}": leave it out' for name in unused]

    @property
    def module_types(self) -> tuple[str, ...]:
        return TARGETS[self.target_modules] if isinstance(self.target_modules, str) else self.target_modules

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)

    def alpha_of(self, rank: int) -> float:
        """The alpha of a module of this rank: by default that with scale 1."""
        if self.alpha is not None:
            return float(self.alpha)
        return math.sqrt(rank) if self.use_rslora else float(rank)


@dataclass(frozen=True)
class AdapterWeights:
    factors: Mapping[str, LowRank]
    """Module name -> effective factors, fp32. Names are the transformer's: `transformer_blocks.0.attn.to_q`."""
    lost: Mapping[str, float] = field(default_factory=dict)
    """The energy that modules had beside these factors, where they were truncated before."""

    def kept(self) -> dict[str, float]:
        """What these factors have of the energy before: as `lowrank.energy_kept` tells it."""
        before = {name: energy(factors) + self.lost.get(name, 0.0) for name, factors in self.factors.items()}
        shares = {name: 1 - self.lost.get(name, 0.0) / whole if whole else 1.0 for name, whole in before.items()}
        return energy_kept(shares, before)


@dataclass(frozen=True)
class Seed:
    """What a run starts from. Modules that are not in it start as PEFT's default: a random, b zero."""

    weights: AdapterWeights
    report: dict[str, Any]
    """What the initializer did, for run.json."""
    frozen: AdapterWeights | None = None
    """A LoRA that stays beside the adapter, frozen, and is part of the exported LoRA."""
    rank: int | None = None
    """The rank of the adapter, instead of the configuration's, with `rank_pattern`."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    others: Mapping[int, Tensor] = field(default_factory=dict)
    """By the number of a training picture: its errors at the sigmas of the stable loss, with the seed that the other
    pictures give on the base. Only if the context asked for a diagnosis."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before any model loads, for an initializer to say what cannot be."""

    images: tuple[Path, ...]
    """The training pictures."""
    adapter: AdapterConfig
    can_try: bool
    """Whether `InitContext.try_seed` will be there."""
    diagnose: bool = False
    """As `InitContext.diagnose`."""


@dataclass(frozen=True)
class Stage:
    """A part of a run, and the peak of its bytes on the GPU."""

    name: str
    num_bytes: float
    instead: float | None = None
    """Bytes on the GPU where there is no room for so many; None if there is no other way."""
    how: str = ""
    """What is done then, such as "on the CPU"."""
    flop: float = 0.0
    """What it computes, for an estimate of its time."""

    @property
    def least(self) -> float:
        return self.num_bytes if self.instead is None else min(self.instead, self.num_bytes)

    def plus(self, num_bytes: float) -> "Stage":
        instead = None if self.instead is None else self.instead + num_bytes
        return replace(self, num_bytes=self.num_bytes + num_bytes, instead=instead)


@dataclass(frozen=True)
class Work:
    """What an initializer does in a run, for an estimate of its time; none of it is in the cache yet."""

    num_bytes: float = 0.0
    """Read and written, beside the base."""
    passes: int = 0
    """Forward passes of the transformer with a picture each."""
    stages: tuple[Stage, ...] = ()
    """What its own models need, before the transformer is loaded."""
    numbers: int = 0
    """In the whole prediction, which is on the GPU while it is tried."""
    stays: bool = False
    """Whether all of it stays beside the adapter."""


@dataclass(frozen=True, kw_only=True)
class InitContext:
    """What an initializer may know."""

    images: tuple[Path, ...]
    """Training pictures only; held-out ones never come here."""
    modules: dict[str, tuple[int, int]]
    """in_features and out_features of each target module."""
    rank: int
    """The rank of the adapter, in modules that have none of their own."""
    seed: int
    device: torch.device
    base: str
    """Folder or id of the pipeline, as `[model] base`."""
    log: Callable[[str], None]
    """Prints a line."""
    cache: Path | None = None
    """Folder for what is expensive to compute; None: nothing is kept."""
    text_encoder: Any = None
    """`qwen_image.TextEncoder` of the base, if it may be loaded already. Whoever needs its memory calls `unload`."""
    try_seed: Callable[[AdapterWeights, int, Sequence[int]], Tensor] | None = None
    """The errors of training picture `index` with these weights on the base, at some of the sigmas of the stable loss,
    by their numbers (`validation.stable_errors`); None where that cannot be had."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Modules that have a rank of their own."""
    diagnose: bool = False
    """Whether `Seed.others` is wanted."""

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)


class Initializer(Protocol):
    """Returns data and touches nothing. `config` is an instance of the `Config` beside it."""

    def __call__(self, context: InitContext, config: Any) -> Seed: ...


def target_modules(transformer: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """in_features and out_features of every module that gets an adapter; before or after `inject`, on any device.

    A type matches the module of that name and all whose name ends in "." and it, as PEFT does it. AdapterError names
    all types that match nothing, or something else than a Linear layer, all modules of `rank_pattern` that get no
    adapter, and what is near.
    """
    sizes = linears(transformer)
    ends, other_ends = _by_end(sizes), _by_end(_other_names(transformer))
    found: set[str] = set()
    problems = []
    for wanted in config.module_types:
        if wrong := other_ends.get(wanted):
            problems.append(f'target_modules: "{wanted}" matches {min(wrong)}, which is not a Linear layer')
        elif wanted not in ends:
            problems.append(f'target_modules: "{wanted}" matches no module; {_nearest(wanted, ends)}')
        found.update(ends.get(wanted, ()))
    problems += _without_effect(config.rank_pattern, found, ends)
    if problems:
        raise AdapterError("\n".join(problems))
    return {name: size for name, size in sizes.items() if name in found}


def num_parameters(config: AdapterConfig, modules: Mapping[str, tuple[int, int]]) -> int:
    """How many numbers are trained; modules: as from `target_modules`. Without DoRA's magnitudes."""
    if config.kind == "lora":
        return sum(config.rank_of(name) * sum(size) for name, size in modules.items())
    return sum(
        lycoris.num_parameters(config.kind, config.rank_of(name), size, config.lokr_factor)
        for name, size in modules.items()
    )


def _without_effect(pattern: Mapping[str, int], trained: set[str], ends: Mapping[str, list[str]]) -> list[str]:
    """A problem for each of the first names in `rank_pattern` that get no adapter, and one for the others together."""
    unused, problems = sorted(pattern.keys() - trained), []
    for name in unused[:NAMED]:
        near = [one for one in ends.get(name, ()) if one in trained][:3] or _nearest_names(name, trained)
        left_out = f'"{name}" gets no adapter, as target_modules leave it out'
        what = left_out if name in ends.get(name, ()) else f'there is no module "{name}"'
        problems.append(f"rank_pattern: {what}" + (f"; near are {', '.join(near)}" if near else ""))
    if more := unused[NAMED:]:
        problems.append(f"rank_pattern: {len(more)} more get no adapter: {first_few(more)}")
    return problems


def settings_for(seed: Seed, settings: AdapterConfig) -> AdapterConfig:
    """With the ranks that the seed asks for."""
    pattern = {**settings.rank_pattern, **seed.rank_pattern}
    return replace(settings, rank=seed.rank or settings.rank, rank_pattern=pattern)


def inject(transformer: Any, config: AdapterConfig, adapter_name: str = NAME) -> None:
    """Put the adapter on the transformer: in fp32 and trainable; everything else is frozen. Then `apply_seed`.

    `transformer` is a diffusers model. The global random state is as it was. Where the base computes in half precision,
    PEFT would raise each layer's whole input to fp32 and keep it for the backward pass; here the adapter's small
    weights are lowered instead. With DoRA it stays as PEFT does it: the norms of the weights need fp32. AdapterError
    if DoRA would divide by the norm of a row that is zero.
    """
    modules = target_modules(transformer, config)
    if config.use_dora and (zero := [name for name in modules if _has_zero_row(transformer.get_submodule(name))]):
        raise AdapterError(
            f"[adapter] use_dora: DoRA divides by the norms of the weights' rows, and some are zero in "
            f"{first_few(zero)}; choose [adapter] target_modules without these layers, or train without DoRA"
        )
    transformer.requires_grad_(False)
    devices = {p.device for p in transformer.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        transformer.add_adapter(peft_config(config), adapter_name)
    device = transformer.device  # diffusers looks at all modules for it
    for name, parameter in _parameters(transformer, adapter_name).items():
        # PEFT takes over a layer's type, in which a seed would be rounded, and its device: the CPU, if it is offloaded
        module, _, own = name.rpartition(".")
        whole = nn.Parameter(parameter.detach().to(device, torch.float32))
        setattr(transformer.get_submodule(module), own, whole)
    for _, layer in layers(transformer, adapter_name):
        if config.kind != "lora":
            layer.forward = lycoris.Forward(layer, adapter_name)
        elif not config.use_dora:
            layer.cast_input_dtype_enabled = False
            for factors in (layer.lora_A, layer.lora_B):
                factors[adapter_name] = _Factor(factors[adapter_name])


def _has_zero_row(layer: Any) -> bool:
    weight: Tensor = layer.weight.detach()
    return weight.device.type != "meta" and not bool(weight.any(dim=1).all())


class _Factor(nn.Linear):
    """a or b as a layer: its weight stays in fp32, with its gradient, and is multiplied in the input's type."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


@dataclass(frozen=True)
class _Fitted:
    """A module's part of a seed, as its layer takes it."""

    problem: str | None = None
    energy: float = 0.0
    """Before anything is lost."""
    kept: float = 1.0
    padded: bool = False
    factors: LowRank | None = None
    """What dW must be in the layer, at the layer's rank; None of a LoKr, where `parts` say it."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Those of a LoHa or LoKr, by PEFT's names."""


@torch.no_grad()
def apply_seed(transformer: nn.Module, seed: Seed, *, random_seed: int, adapter_name: str = NAME) -> dict[str, Any]:
    """Write the seed into the adapter, at the adapter's ranks, and verify it: the report says what became of it.

    A larger rank is truncated exactly; a smaller one is balanced, and filled with rows that change nothing until they
    are trained; an equal one is taken as it is. A LoKr takes the nearest Kronecker product. Then dW is read back and
    compared, module by module. What has no energy starts as PEFT's default. AdapterError if dW differs, if no module of
    the seed is trained here, or if the seed has other sizes or NaN.
    """
    start = time.perf_counter()
    sizes = linears(transformer)
    found = dict(layers(transformer, adapter_name))
    given, cut = seed.weights.factors, seed.weights.lost
    if given and not given.keys() & found.keys():
        raise AdapterError(
            f"the seed has none of the modules that are to be trained. It has {first_few(sorted(given))}; "
            f"to be trained are {first_few(sorted(found))}"
        )

    def fit(name: str) -> _Fitted:
        whole = given[name] if name in given else zeros(*sizes[name])
        if problem := _misfit(whole, sizes[name]):
            return _Fitted(f"{name} {problem}")
        random = generator(random_seed, "adapter", name)
        return _fit(found[name], whole, cut.get(name, 0.0), random, adapter_name)

    # each is asked for once: a seed may be made as it is asked for, and fill no memory
    fitted = dict(zip(found, parallel_map(fit, found), strict=True))
    if problems := [one.problem for one in fitted.values() if one.problem]:
        raise AdapterError(f"the seed does not fit: {first_few(problems, '; ')}")
    largest = _put(transformer, fitted, adapter_name)
    energies = {name: one.energy for name, one in fitted.items() if one.energy}
    kept = {name: fitted[name].kept for name in energies}
    lost = dict[str, float]()
    for name in given:
        if name not in found and (before := energy(given[name]) + cut.get(name, 0.0)):
            lost[name] = energies[name] = before
    total = sum(energies.values())
    return {
        "adapter": KINDS[_kind(next(iter(found.values())))],
        "seeded": len(kept),
        "padded": sum(fitted[name].padded for name in kept),
        "random": len(found) - len(kept),
        "dropped": {name: value / total for name, value in sorted(lost.items())},
        "energy_kept": energy_kept(kept, energies) if kept else None,
        "largest_error": largest,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _fit(layer: Any, whole: LowRank, cut: float, random: torch.Generator, adapter_name: str) -> _Fitted:
    """cut: the energy that `whole` has lost before, by truncation."""
    kind, limit, scaling, left = _kind(layer), layer.r[adapter_name], layer.scaling[adapter_name], energy(whole)
    shapes = {part: tuple(parameter.shape) for part, parameter in _parts(layer, adapter_name).items()}
    before, read = left + cut, left / (left + cut) if left else 0.0
    if kind != "lora" and not left:
        nothing = zeros(whole.a.shape[1], len(whole.b)) if kind == "loha" else None
        return _Fitted(energy=before, kept=read, factors=nothing, parts=lycoris.default_start(shapes, random))
    if kind == "lokr":
        parts, share = lycoris.lokr_start(whole, shapes, scaling, random)
        return _Fitted(energy=before, kept=share * read, parts=parts)
    factors, share = _at_most(whole, limit)
    wanted = pad(factors, limit, random)
    parts = lycoris.loha_start(wanted, scaling, random) if kind == "loha" else {}
    return _Fitted(energy=before, kept=share * read, padded=rank(factors) < limit, factors=wanted, parts=parts)


def _put(transformer: nn.Module, fitted: Mapping[str, _Fitted], adapter_name: str) -> float:
    """Into the layers, and verified, as `verify` does it; of a LoKr the product of the parts is compared."""
    found = dict(layers(transformer, adapter_name))
    requested = {name: one.factors for name, one in fitted.items() if one.factors is not None}
    wanted = {name: one.parts for name, one in fitted.items() if one.parts}
    for name, given in wanted.items():
        for part, parameter in _parts(found[name], adapter_name).items():
            parameter.copy_(given[part])
    if not wanted:
        _write(found, requested, adapter_name)
    if requested:
        return verify(transformer, AdapterWeights(requested), adapter_name)
    actual = parts(transformer, adapter_name)
    return _largest({name: lycoris.difference(given, actual[name]) for name, given in wanted.items()})


def verify(transformer: nn.Module, requested: AdapterWeights, adapter_name: str = NAME) -> float:
    """The largest relative difference between the adapter's dW and what was requested. AdapterError if above 1e-5."""
    actual = read(transformer, adapter_name).factors
    if different := sorted(actual.keys() ^ requested.factors.keys()):
        raise AdapterError(f"the seed is not in the adapter: its modules differ, as in {first_few(different)}")
    names = list(requested.factors)
    compared = parallel_map(lambda name: relative_difference(requested.factors[name], actual[name]), names)
    return _largest(dict(zip(names, compared, strict=True)))


def _largest(errors: Mapping[str, float]) -> float:
    """The largest of the modules' errors. AdapterError if above 1e-5."""
    if wrong := [name for name, error in errors.items() if not error <= TOLERANCE]:
        worst = max(wrong, key=lambda name: errors[name])
        raise AdapterError(
            f"the seed is not in the adapter: {len(wrong)} of {len(errors)} modules differ from what was asked, "
            f"{worst} by {errors[worst]:.1e} of its norm. Nothing was trained."
        )
    return max(errors.values())


def read(transformer: nn.Module, adapter_name: str = NAME, limit: int | None = None) -> AdapterWeights:
    """The adapter's effective factors, on the CPU, in fp32. With DoRA: of the direction.

    limit: what a LoHa or LoKr, whose rank may be thousands, is truncated to, exactly; the weights say what is lost.
    """
    factors, lost = dict[str, LowRank](), dict[str, float]()
    for name, layer in layers(transformer, adapter_name):
        scaling = layer.scaling[adapter_name]
        if _kind(layer) != "lora":
            factors[name], lost[name] = lycoris.factors(_on_cpu(_parts(layer, adapter_name)), scaling, limit)
            continue
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        factors[name] = LowRank(a.detach().float().cpu().clone(), b.detach().float().cpu() * scaling)
    if not factors:
        raise AdapterError("this transformer has no adapter")
    return AdapterWeights(factors, lost)


def parts(transformer: nn.Module, adapter_name: str = NAME) -> dict[str, dict[str, Tensor]]:
    """The parts of each module of a LoHa or LoKr, on the CPU, by PEFT's names; what they are scaled by: `scales`."""
    return {name: _on_cpu(_parts(layer, adapter_name)) for name, layer in layers(transformer, adapter_name)}


def attach_frozen(transformer: nn.Module, weights: AdapterWeights) -> list[RemovableHandle]:
    """Add dW of `weights` to the layers' outputs, not trained, until the handles are removed. In the outputs' type.

    AdapterError if a module is missing or of another size.
    """
    sizes = linears(transformer)
    problems = []
    for name, (a, b) in weights.factors.items():
        if name not in sizes:
            problems.append(f"this model has no {name}")
        elif not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            problems.append(f"{name} contains NaN or infinity")
        elif (a.shape[1], b.shape[0]) != sizes[name]:
            problems.append(
                "{} is {} -> {} in the seed and {} -> {} in the model".format(
                    name, a.shape[1], b.shape[0], *sizes[name]
                )
            )
    if problems or not weights.factors:
        raise AdapterError(f"no frozen LoRA can be attached: {first_few(problems, '; ') or 'the seed is empty'}")
    return [
        transformer.get_submodule(name).register_forward_hook(_Constant(factors))
        for name, factors in weights.factors.items()
    ]


class _Constant:
    """A hook: output + x a^T b^T"""

    def __init__(self, factors: LowRank):
        self._a, self._b = factors.a, factors.b
        self.on = True

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.on:
            return output
        self._a, self._b = self._a.to(output), self._b.to(output)
        return output + inputs[0].to(output.dtype) @ self._a.T @ self._b.T


@contextmanager
def switched_off(transformer: nn.Module) -> Iterator[None]:
    """Inside, the transformer is the frozen base: without the adapter, and without what `attach_frozen` has added.

    PEFT's own switch would also tell the factors that they need no gradient.
    """
    adapted = [layer for _, layer in layers(transformer)]
    added = {hook: hook.on for hook in _attached(transformer)}
    for layer in adapted:
        layer._disable_adapters = True
    for hook in added:
        hook.on = False
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False
        for hook, before in added.items():
            hook.on = before


@contextmanager
def with_other(transformer: nn.Module, weights: AdapterWeights) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Put another LoRA on the transformer, which counts only inside what this yields; all others do not count there.
    Without factors it is the base. AdapterError as `attach_frozen`."""
    before = _attached(transformer)
    handles = attach_frozen(transformer, weights) if weights.factors else []
    own = [hook for hook in _attached(transformer) if hook not in before]

    def switch(on: bool) -> None:
        for hook in own:
            hook.on = on

    @contextmanager
    def inside() -> Iterator[None]:
        with switched_off(transformer):  # which ends with all as they were
            switch(True)
            yield

    switch(False)
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def _attached(transformer: nn.Module) -> list[_Constant]:
    """What `attach_frozen` has put on the layers and was not removed."""
    hooks = (hook for module in transformer.modules() for hook in module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, _Constant)]


def remove(transformer: Any) -> None:
    """Take the adapter off again; the base is as it was before `inject`."""
    transformer.unload_lora()


def module_of(parameter: str) -> str:
    """The adapted module that a trained tensor belongs to, by the tensor's name."""
    return re.split(r"\.(?:lora|hada|lokr)_", parameter, maxsplit=1)[0]


def lr_factor(config: AdapterConfig, parameter: str) -> float:
    """What the learning rate of a trained tensor is multiplied by."""
    return config.lora_plus_ratio if ".lora_B." in parameter else 1.0


def scales(transformer: nn.Module) -> dict[str, float]:
    """What PEFT multiplies b a by, or the product of a LoHa or LoKr, of each module."""
    return {name: float(layer.scaling[NAME]) for name, layer in layers(transformer)}


def tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under their own names, for checkpoints. They are not copies."""
    return {name: parameter.detach() for name, parameter in _parameters(transformer).items()}


@torch.no_grad()
def load_tensors(transformer: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put back what `tensors` gave. AdapterError if anything is missing, unexpected or of another shape."""
    parameters = _parameters(transformer)
    problems = [
        *(f"{name} is missing" for name in parameters.keys() - saved.keys()),
        *(f"{name} is not in this adapter" for name in saved.keys() - parameters.keys()),
        *(
            f"{name} is {tuple(saved[name].shape)} instead of {tuple(parameters[name].shape)}"
            for name in saved.keys() & parameters.keys()
            if saved[name].shape != parameters[name].shape
        ),
    ]
    if problems:
        raise AdapterError(f"the saved tensors are of another adapter: {first_few(sorted(problems), '; ')}")
    for name, parameter in parameters.items():
        parameter.copy_(sharded_like(saved[name], parameter))


def peft_config(config: AdapterConfig) -> LoraConfig | LoHaConfig | LoKrConfig:
    """PEFT's form of it."""
    ranks = pattern_of_ranks(config.rank_pattern)
    alphas = {pattern: config.alpha_of(rank) for pattern, rank in ranks.items()}
    options: dict[str, Any] = {
        "r": config.rank,
        "target_modules": list(config.module_types),
        "rank_pattern": ranks,
        "alpha_pattern": alphas if config.alpha is None else {},
    }
    alpha: Any = config.alpha_of(config.rank)  # PEFT says int and takes any number
    if config.kind == "loha":
        return LoHaConfig(alpha=alpha, **options)
    if config.kind == "lokr":
        return LoKrConfig(alpha=alpha, decompose_factor=config.lokr_factor, **options)
    return LoraConfig(
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        **options,
    )


def pattern_of_ranks(ranks: Mapping[str, int]) -> dict[str, int]:
    """PEFT's `rank_pattern` for modules by their names: one regular expression for each rank. PEFT tries all of them on
    each module, and compiles them anew where there are hundreds."""
    names: dict[int, list[str]] = {}
    for name, wanted in ranks.items():
        names.setdefault(wanted, []).append(name)
    return {"|".join(group): wanted for wanted, group in names.items()}


def linears(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """in_features and out_features of Linear layers, quantised ones too (all are subclasses), by the names they
    have without an adapter."""
    adapted = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, _LAYERS)}
    inside = tuple(f"{name}." for name in adapted)
    return {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if (name in adapted or isinstance(module, nn.Linear)) and not name.startswith(inside)
    }


def _other_names(transformer: nn.Module) -> list[str]:
    inside = tuple(f"{name}." for name, layer in transformer.named_modules() if isinstance(layer, _LAYERS))
    return [
        name
        for name, module in transformer.named_modules()
        if not isinstance(module, (nn.Linear, *_LAYERS)) and not name.startswith(inside)
    ]


def matches(name: str, wanted: str) -> bool:
    """PEFT's rule: the module of that name, and all whose name ends in "." and it."""
    return name == wanted or name.endswith("." + wanted)


def _by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """What `matches` each end of a name: a name is an end of itself."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(name)
    return found


def _nearest(wanted: str, ends: Iterable[str]) -> str:
    """The ends of names most like `wanted`."""
    near = _nearest_names(wanted, ends)
    return f"near are {', '.join(near)}" if near else f"this model has {first_few(sorted(TARGETS['all']))}"


def _nearest_names(wanted: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(wanted, sorted(names), n=3, cutoff=0.5)


def layers(transformer: nn.Module, adapter_name: str = NAME) -> Iterator[tuple[str, Any]]:
    """Names and PEFT's layers of a LoRA, LoHa or LoKr, whose attributes no type checker can follow."""
    for name, module in transformer.named_modules():
        if isinstance(module, _LAYERS) and adapter_name in module.r:
            yield name, module


_LAYERS = (LoraLayer, LoHaLayer, LoKrLayer)


def _kind(layer: Any) -> str:
    """One of `KINDS`."""
    return "loha" if isinstance(layer, LoHaLayer) else "lokr" if isinstance(layer, LoKrLayer) else "lora"


def _parts(layer: Any, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of a layer of a LoHa or LoKr by PEFT's names; empty of a LoRA."""
    return {} if _kind(layer) == "lora" else lycoris.parts_of(layer, adapter_name)


def _on_cpu(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.detach().float().cpu() for part, tensor in parts.items()}


def _parameters(transformer: nn.Module, adapter_name: str = NAME) -> dict[str, nn.Parameter]:
    """a, b and, with DoRA, the magnitude of every adapted module, or the parts of its LoHa or LoKr."""
    return {
        f"{name}.{part}": parameter
        for name, layer in layers(transformer, adapter_name)
        for part, parameter in layer.named_parameters()
        if part.startswith(("lora_", "hada_", "lokr_"))
    }


def _misfit(factors: LowRank, size: tuple[int, int]) -> str | None:
    """What is wrong with the factors of a module of that size (in_features, out_features)."""
    a, b = factors
    if (a.shape[1], b.shape[0]) != size:
        return f"is {a.shape[1]} -> {b.shape[0]} in the seed and {size[0]} -> {size[1]} in the model"
    if a.shape[0] != b.shape[1]:
        return f"has rank {a.shape[0]} in a and {b.shape[1]} in b"
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return "contains NaN or infinity"
    return None


def _at_most(factors: LowRank, limit: int) -> tuple[LowRank, float]:
    """At most of rank `limit`, on the CPU, and the share of energy kept.

    At that very rank it is untouched, being another run's result, or having random rows in a; only rows that are zero
    in both factors go, as some trainers pad with them and they could never learn.
    """
    if rank(factors) == limit:
        alive = (factors.a != 0).any(dim=1) | (factors.b != 0).any(dim=0)
        factors, energy = LowRank(factors.a[alive], factors.b[:, alive]), 1.0
    else:
        factors, energy = truncate(factors, limit)
    return LowRank(factors.a.float().cpu(), factors.b.float().cpu()), energy


def _write(layers: Mapping[str, Any], requested: Mapping[str, LowRank], adapter_name: str) -> None:
    for name, factors in requested.items():
        layer, scaling = layers[name], layers[name].scaling[adapter_name]
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        a.copy_(factors.a)
        b.copy_(factors.b / scaling)
        if adapter_name in layer.lora_magnitude_vector:
            # PEFT made it when b was 0. As the norms of W + dW it leaves W + dW as it is.
            magnitude = layer.lora_magnitude_vector[adapter_name]
            device = magnitude.weight.device
            magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=scaling)
            magnitude.weight.data = magnitude.weight.data.float().to(device)
