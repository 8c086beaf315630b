"""A folder for another trainer: the LoRA as it reads it, the lines of its configuration, and what to check."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.adapter import AdapterWeights
from trainer.files import DTYPES, new_folder, write_text
from trainer.flow import generator
from trainer.formats.check import Verdict, judge
from trainer.formats.layouts import module_types
from trainer.formats.lora import FormatError, interface_metadata, write_lora
from trainer.formats.origin import ORIGIN
from trainer.formats.read_config import Recipe, rank_problem, read_recipe
from trainer.formats.rules import TRAINERS, by_suffix
from trainer.formats.write_config import SNIPPETS, Start, readme
from trainer.lowrank import LowRank, energy, energy_kept, ordered, pad, rank, relative_difference, zeros
from trainer.qwen_image import Dtype


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a LoRA is converted for."""

    trainer: str
    """A key of `TRAINERS`."""
    modules: Mapping[str, tuple[int, int]]
    """in_features and out_features of the model's Linear layers."""
    base: str = "Qwen/Qwen-Image"
    """Id or folder of the model, for the configuration that is written."""
    recipe: Recipe | None = None
    """The trainer's configuration, if the user has one."""
    rank: int | None = None
    """The rank of the new file. By default the recipe's, else the largest of the LoRA."""
    dtype: Dtype = "fp32"

    def adapter(self, weights: AdapterWeights) -> Recipe:
        """The adapter that the trainer builds: the recipe's, else one on the LoRA's own types in every block.

        FormatError if the recipe contradicts `rank`.
        """
        if self.recipe is None:
            wanted = self.rank or max(rank(x) for x in weights.factors.values())
            types = module_types([name for name in weights.factors if TRAINERS[self.trainer].covers(name)])
            return Recipe(rank=wanted, alpha=float(wanted), trains=by_suffix(types))
        if problem := rank_problem(self.recipe, self.rank):
            raise FormatError(problem)
        return self.recipe


@dataclass(frozen=True)
class Handoff:
    """A folder that was written for another trainer."""

    folder: Path
    file: Path
    lines: list[str]
    """What became of the LoRA, for people."""
    verdict: Verdict
    """What the trainer will do with the file, given the configuration that was written beside it."""


def hand_off(weights: AdapterWeights, target: Target, folder: Path, metadata: Mapping[str, str]) -> Handoff:
    """Write `folder`, whole or not at all, from effective factors of any rank; the file is named as the folder.

    Factors are truncated exactly, rows in the order of their singular values, and padded with rows that change nothing
    and can learn. FormatError if nothing would be left, or if the recipe contradicts the rank.
    """
    trainer, given = target.trainer, target.adapter(weights)
    fitted = _fit(weights, target, given)
    file_name = f"{folder.name}.safetensors"
    with new_folder(folder) as partial:
        extra = _write_files(partial, file_name, fitted, target, given, metadata)
        types, snippet, recipe = module_types(fitted.trained), None, target.recipe
        if trainer in SNIPPETS:
            snippet = SNIPPETS[trainer](Start(folder.absolute() / file_name, given, types, target.base))
            write_text(partial / snippet.name, snippet.text)
            if trainer == "simpletuner":  # which reads its targets from a file of their own
                write_text(partial / "targets.json", json.dumps(types) + "\n")
            recipe = recipe or read_recipe(partial / snippet.name, trainer)  # what the lines say is checked, too
        lines = _account(fitted, given)
        if target.dtype != "fp32":
            lines.append(
                f"rounded to {target.dtype}: dW differs by at most {fitted.rounding(DTYPES[target.dtype]):.1%}"
            )
        verdict = judge(partial / file_name, trainer, target.modules, recipe)
        write_text(partial / "README.md", readme(trainer, file_name, extra, lines, snippet, given.rank))
    return Handoff(folder, folder / file_name, lines, verdict)


@dataclass(frozen=True)
class _Fitted:
    """A LoRA brought to the modules and the rank that a trainer trains."""

    factors: dict[str, LowRank]
    """What is written."""
    kept: dict[str, float]
    """The share of its energy that each module of the LoRA keeps, of those that are trained."""
    energies: dict[str, float]
    """The energy of all modules of the LoRA."""
    trained: list[str]

    def rounding(self, dtype: torch.dtype) -> float:
        """The largest relative difference of dW after rounding."""
        return max(
            relative_difference(x, LowRank(x.a.to(dtype).float(), x.b.to(dtype).float()))
            for name, x in self.factors.items()
            if name in self.kept
        )


def _fit(weights: AdapterWeights, target: Target, given: Recipe) -> _Fitted:
    trained, factors = given.targets(target.modules), dict[str, LowRank]()
    kept, energies = dict[str, float](), dict[str, float]()
    for module, whole in weights.factors.items():  # each is read once: it may be computed then
        if target.modules.get(module) != (whole.a.shape[1], whole.b.shape[0]):
            raise FormatError(f"the model has no {module} of this size: choose --base")
        left = energy(whole)
        energies[module] = left + weights.lost.get(module, 0.0)
        if module in trained:
            on_cpu = LowRank(whole.a.cpu(), whole.b.cpu())
            factors[module], share = ordered(on_cpu, given.rank, generator("hand off", module))
            kept[module] = share * left / energies[module] if left else share
    if not factors:
        raise FormatError(f"none of the LoRA's {len(energies)} modules is trained by the recipe")
    if TRAINERS[target.trainer].rules_for(True).missing == "error":  # else the trainer starts the others itself
        for module in trained:
            if module not in factors:
                nothing = zeros(*target.modules[module])
                factors[module] = pad(nothing, given.rank, generator("hand off", module))
    return _Fitted({module: factors[module] for module in trained if module in factors}, kept, energies, trained)


def _write_files(
    folder: Path, file_name: str, fitted: _Fitted, target: Target, given: Recipe, metadata: Mapping[str, str]
) -> list[str]:
    """Write the LoRA, and for musubi-tuner a second file; returns the names of further files."""
    trainer, dtype, name = TRAINERS[target.trainer], DTYPES[target.dtype], file_name.removesuffix(".safetensors")
    alpha = given.alpha if trainer.rules_for(True).scale == "recipe" and given.alpha != given.rank else None
    shown = interface_metadata(trainer.layout, name, [given.rank], alpha=alpha)
    entries, ready = {**_with_energy(metadata, fitted), **shown}, AdapterWeights(fitted.factors)
    write_lora(folder / file_name, ready, entries, dtype, layout=trainer.layout, alpha=alpha)
    if target.trainer != "musubi-tuner" or given.alpha == 1:
        return []
    second = f"{name}-alpha1.safetensors"
    entries = {**entries, "ss_network_alpha": "1"}
    write_lora(folder / second, ready, entries, dtype, layout=trainer.layout, alpha=1.0)
    return [second]


def _with_energy(metadata: Mapping[str, str], fitted: _Fitted) -> dict[str, str]:
    """The metadata, in which the origin says which share of the whole LoRA's energy is left."""
    found = dict(metadata)
    if ORIGIN in found:
        origin, before = json.loads(found[ORIGIN]), fitted.energies
        left = energy_kept({module: fitted.kept.get(module, 0.0) for module in before}, before)["total"]
        origin["energy_kept"] = left * (1.0 if origin.get("energy_kept") is None else origin["energy_kept"])
        found[ORIGIN] = json.dumps(origin)
    return found


def _account(fitted: _Fitted, recipe: Recipe) -> list[str]:
    """What became of the LoRA, a sentence for each thing."""
    kept, energies, factors = fitted.kept, fitted.energies, fitted.factors
    total = sum(energies.values()) or 1.0
    lines = [f"{len(kept)} modules, rank {recipe.rank}, alpha {recipe.alpha:g}"]
    lost = sum(energies[module] * (1 - kept[module]) for module in kept) / total
    if lost > 5e-5:
        lines.append(f"truncated to the rank: {lost:.2%} of the energy is lost")
    if filled := [module for module in factors if module not in energies]:
        lines.append(f"filled with rows that change nothing, since none may be missing: {_counted(filled)}")
    if absent := [module for module in fitted.trained if module not in factors]:
        lines.append(f"trained but not in the LoRA, so the trainer starts them at random: {_counted(absent)}")
    if dropped := [module for module in energies if module not in factors]:
        share = sum(energies[module] for module in dropped) / total
        types = ", ".join(module_types(dropped))
        what = f"{len(dropped)} modules ({types}), with {share:.2%} of the energy"
        lines.append(f"dropped, because they are not trained: {what}")
    return lines


def _counted(modules: Sequence[str]) -> str:
    return f"{len(modules)} modules, such as {modules[0]}"
