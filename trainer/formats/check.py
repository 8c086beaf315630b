"""What a trainer will do with a LoRA file, said beforehand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.adapter import AdapterWeights
from trainer.formats.layouts import layouts_of
from trainer.formats.lora import DIFFUSERS_METADATA, LoraFile, open_lora
from trainer.formats.read_config import Recipe, default_recipe
from trainer.formats.rules import TRAINERS, Rules
from trainer.lowrank import LowRank, norm, rank, relative_difference, scale

TOLERANCE = 1e-5


@dataclass
class Verdict:
    trainer: str
    layouts: list[str]
    loaded: dict[str, LowRank] = field(default_factory=dict)
    """What is on the modules at step 0, effective."""
    scales: dict[str, float] = field(default_factory=dict)
    """How much of the effect that the file means arrives in each module: 1 is all of it."""
    random: list[str] = field(default_factory=list)
    """Trained, and not started by the file: a random, b zero."""
    ignored: dict[str, str] = field(default_factory=dict)
    """In the file and not loaded -> why."""
    dead: dict[str, int] = field(default_factory=dict)
    """Ranks that are zero in both factors, and will never learn."""
    errors: list[str] = field(default_factory=list)
    """That the trainer will raise, or that its start from the file would be another one."""
    notes: list[str] = field(default_factory=list)
    difference: float = 0.0
    """|dW at step 0 - dW of the file| / |dW of the file|, over all modules."""

    @property
    def equal(self) -> bool:
        """Whether the start is the file."""
        return not self.errors and self.difference <= TOLERANCE


def judge(path: Path, trainer: str, modules: Mapping[str, tuple[int, int]], recipe: Recipe | None = None) -> Verdict:
    """By the rules in `TRAINERS`, for a model with these Linear layers (in_features, out_features). Without a recipe:
    at the file's rank, with that trainer's defaults otherwise. FormatError if the file is not a LoRA of Qwen-Image."""
    file, known = open_lora(path), TRAINERS[trainer]
    weights, _ = file.read()
    rules = known.rules_for(recipe is not None)
    if recipe is None:
        recipe = default_recipe(trainer, max(rank(x) for x in weights.factors.values()))
    verdict = Verdict(trainer, layouts_of(file.modules), notes=list(recipe.notes))
    _check_sizes(weights, modules, verdict)
    _load(verdict, file, weights, rules, _Adapter(recipe, modules))
    if known.older is not None:
        before = Verdict(trainer, verdict.layouts)
        _load(before, file, weights, known.older, _Adapter(recipe, modules))
        if not before.equal:
            verdict.notes.append(f"a version before {known.since} does not start from this file: {_reason(before)}")
    return verdict


@dataclass(frozen=True)
class _Adapter:
    """What the trainer has built before it reads the file."""

    recipe: Recipe
    modules: Mapping[str, tuple[int, int]]
    """The model's Linear layers."""


def _load(verdict: Verdict, file: LoraFile, weights: AdapterWeights, rules: Rules, adapter: _Adapter) -> None:
    recipe = adapter.recipe
    trained = set(weights.factors) if rules.extra == "none" else set(recipe.targets(adapter.modules))
    alpha_keys = [name for name, keys in file.modules.items() if keys.alpha]
    if alpha_keys and rules.alpha_keys == "error":
        verdict.errors.append(f"{len(alpha_keys)} keys .alpha are in the file: {rules.alpha_error}")
    for name, factors in weights.factors.items():
        why = _not_loaded(name, file, rules, trained)
        if why is not None:
            verdict.ignored[name] = why
            continue
        arriving = _scale(name, file, rules, recipe) / file.scales[name]
        verdict.scales[name] = arriving
        resized, dead = _resize(factors, recipe.rank, rules)
        verdict.loaded[name] = scale(resized, arriving)
        dead += int(((factors.a == 0).all(dim=1) & (factors.b == 0).all(dim=0)).sum())
        if dead:
            verdict.dead[name] = dead
    verdict.random = sorted(trained - verdict.loaded.keys()) if rules.missing == "random" else []
    _collect_errors(verdict, rules, recipe, {name: rank(x) for name, x in weights.factors.items()}, trained)
    verdict.difference = _difference(weights, verdict.loaded)


def _reason(verdict: Verdict) -> str:
    """Why the start is not the file, in few words."""
    if verdict.errors:
        return verdict.errors[0]
    if wrong := sorted({round(value, 6) for value in verdict.scales.values() if abs(value - 1) > TOLERANCE}):
        return f"it arrives at {wrong[-1]:g} times the effect that the file means"
    return f"{len(verdict.ignored)} modules are ignored, and start at random"


def _check_sizes(weights: AdapterWeights, modules: Mapping[str, tuple[int, int]], verdict: Verdict) -> None:
    sizes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in weights.factors.items()}
    if strangers := [name for name in sizes if name not in modules]:
        verdict.errors.append(
            f"the model has no {strangers[0]} ({len(strangers)} such): is it for another base? (choose it by --base)"
        )
    if wrong := [name for name in sizes if name in modules and modules[name] != sizes[name]]:
        here, there = ("{} -> {}".format(*size[wrong[0]]) for size in (sizes, modules))
        verdict.errors.append(
            f"{len(wrong)} modules have other sizes than the model's, as {wrong[0]}, {here} instead of {there}: is it "
            "for another base? (--base)"
        )


def _not_loaded(name: str, file: LoraFile, rules: Rules, trained: set[str]) -> str | None:
    if not rules.takes(name, file.modules[name]):
        return f"key not known: {file.modules[name].a}"
    return None if name in trained else "not among the modules that are trained"


def _scale(name: str, file: LoraFile, rules: Rules, recipe: Recipe) -> float:
    if rules.scale == "recipe":
        return recipe.alpha / recipe.rank
    heeded = rules.reads_peft_metadata and DIFFUSERS_METADATA in file.metadata
    if rules.scale == "one" or (file.modules[name].alpha is None and not heeded):
        return 1.0
    return file.scales[name]


def _resize(factors: LowRank, wanted: int, rules: Rules) -> tuple[LowRank, int]:
    """As the trainer brings it to its rank, and the dead ranks that this makes."""
    if rules.rank != "resized":
        return factors, 0
    leading = LowRank(factors.a[:wanted], factors.b[:, :wanted])
    return leading, max(0, wanted - rank(factors))


def _collect_errors(
    verdict: Verdict, rules: Rules, recipe: Recipe, ranks: Mapping[str, int], trained: set[str]
) -> None:
    foreign = [name for name, why in verdict.ignored.items() if why.startswith("key")]
    if foreign and rules.foreign == "error":
        verdict.errors.append(f"{len(foreign)} modules have keys that it does not know, as {foreign[0]}")
    others = [name for name in verdict.loaded if ranks[name] != recipe.rank]
    if others and rules.rank == "equal":
        verdict.errors.append(
            f"{len(others)} modules have another rank than the configuration's {recipe.rank}, as {others[0]} with "
            f"{ranks[others[0]]}"
        )
    if rules.rank == "one" and len(mixed := sorted({ranks[name] for name in verdict.loaded})) > 1:
        verdict.errors.append(f"ranks {mixed[0]} to {mixed[-1]} are in the file: it takes one for all modules")
    if rules.missing == "error" and (missing := sorted(trained - verdict.loaded.keys())):
        verdict.errors.append(f"{len(missing)} modules are trained and not in the file, as {missing[0]}")
    extra = [name for name, why in verdict.ignored.items() if not why.startswith("key")]
    if rules.extra == "error" and extra:
        verdict.errors.append(f"{len(extra)} modules are in the file and not trained, as {extra[0]}")


def _difference(weights: AdapterWeights, loaded: Mapping[str, LowRank]) -> float:
    """Over all modules of the file, as Frobenius norms."""
    total = torch.tensor([norm(x) for x in weights.factors.values()], dtype=torch.float64).square().sum()
    lost = 0.0
    for name, factors in weights.factors.items():
        share = relative_difference(factors, loaded[name]) if name in loaded else 1.0
        lost += (share * norm(factors)) ** 2 if norm(factors) else 0.0
    return float((lost / total).sqrt()) if total else 0.0


def verdict_text(verdict: Verdict) -> str:
    """In words, with what to do."""
    lines = [
        f"layout       {', '.join(verdict.layouts) or 'several, or none of ours'}",
        f"loaded       {len(verdict.loaded)} modules{_scales(verdict)}",
    ]
    if verdict.ignored:
        reasons: dict[str, list[str]] = {}
        for name, why in verdict.ignored.items():
            reasons.setdefault(why.split(":")[0], []).append(name)
        lines += [f"ignored      {len(names)}: {why}, as {names[0]}" for why, names in reasons.items()]
    if verdict.random:
        lines.append(
            f"random       {len(verdict.random)} modules start at random (a random, b zero), as {verdict.random[0]}"
        )
    if verdict.dead:
        most = max(verdict.dead.values())
        lines.append(
            f"dead ranks   up to {most} in {len(verdict.dead)} modules: zero in both factors, they never learn"
        )
    lines += [f"error        {error}" for error in verdict.errors]
    lines += [f"note         {note}" for note in verdict.notes]
    title = TRAINERS[verdict.trainer].title
    if verdict.equal:
        lines.append(f"{title} starts from this file: dW at step 0 is the file's")
    else:
        wrong = f"dW at step 0 differs from the file's by {verdict.difference:.0%}"
        lines.append(f"{title} does not start from this file: {'see the errors' if verdict.errors else wrong}")
        lines.append(f"`python -m trainer.formats convert FILE OUT --for {verdict.trainer}` makes one that fits")
    return "\n".join(lines)


def _scales(verdict: Verdict) -> str:
    values = sorted(set(round(value, 6) for value in verdict.scales.values()))
    if not values:
        return ""
    shown = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
    return f", at {shown} times the effect that the file means"
