"""A folder for another trainer: the LoRA as it reads it, the lines of its configuration, and what to check."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.adapter import TARGETS, AdapterWeights
from trainer.files import DTYPES, new_folder, write_text
from trainer.flow import generator
from trainer.formats.check import Verdict, judge
from trainer.formats.lora import FormatError, interface_metadata, write_lora
from trainer.formats.read_config import Recipe, read_recipe
from trainer.formats.rules import TRAINERS, by_suffix
from trainer.formats.write_config import SNIPPETS, readme
from trainer.lowrank import LowRank, norm, ordered, pad, rank, relative_difference, zeros
from trainer.qwen_image import Dtype


@dataclass(frozen=True)
class Handoff:
    folder: Path
    file: Path
    lines: list[str]
    """What became of the LoRA, for people."""
    verdict: Verdict
    """On the file that was written, with the configuration that was written beside it."""


def hand_off(
    weights: AdapterWeights,
    trainer: str,
    modules: Mapping[str, tuple[int, int]],
    folder: Path,
    *,
    name: str,
    metadata: Mapping[str, str],
    recipe: Recipe | None = None,
    wanted_rank: int | None = None,
    dtype: Dtype = "fp32",
) -> Handoff:
    """Write `folder`, whole or not at all, from effective factors of any rank.

    The modules are those that the recipe trains, else those of the LoRA's own types in every block; the rank is the
    recipe's, else `wanted_rank`, else the largest. Factors are truncated exactly, rows in the order of their singular
    values, and padded with rows that change nothing and can learn. FormatError if nothing would be left, or if the
    recipe contradicts `wanted_rank`.
    """
    target, rules = TRAINERS[trainer], TRAINERS[trainer].rules_for(True)
    if recipe is not None and wanted_rank not in (None, recipe.rank):
        raise FormatError(f"--rank {wanted_rank} contradicts the recipe, which has rank {recipe.rank}: leave one out")
    own = wanted_rank or (0 if recipe else max(rank(x) for x in weights.factors.values()))
    given = recipe or Recipe(rank=own, alpha=float(own), trains=by_suffix(_types(weights.factors)))
    trained = given.targets(modules)
    short, kept, energies = dict[str, LowRank](), dict[str, float](), dict[str, float]()
    for module, whole in weights.factors.items():  # each is asked for once: it may be made then
        if modules.get(module) != (whole.a.shape[1], whole.b.shape[0]):
            raise FormatError(f"the model has no {module} of this size: choose --base")
        energies[module] = norm(whole) ** 2
        if module in trained:
            on_cpu = LowRank(whole.a.cpu(), whole.b.cpu())
            short[module], kept[module] = ordered(on_cpu, given.rank, generator("hand off", module))
    factors = {
        module: short[module]
        if module in short
        else pad(zeros(*modules[module]), given.rank, generator("hand off", module))
        for module in trained
        if module in short or rules.missing == "error"  # else the trainer itself starts it: a random, b zero
    }
    if not short:
        raise FormatError(f"none of the LoRA's {len(energies)} modules is trained by the recipe")
    alpha = given.alpha if rules.scale == "recipe" and given.alpha != given.rank else None
    file_name = f"{name}.safetensors"
    with new_folder(folder) as partial:
        ready = AdapterWeights(factors)
        shown = interface_metadata(target.layout, name, [given.rank], alpha=alpha)
        entries = {**_with_energy(metadata, kept, energies), **shown}
        write_lora(partial / file_name, ready, entries, DTYPES[dtype], layout=target.layout, alpha=alpha)
        extra = []
        if trainer == "musubi-tuner" and given.alpha != 1:
            extra.append(f"{name}-alpha1.safetensors")
            one = {**entries, "ss_network_alpha": "1"}
            write_lora(partial / extra[0], ready, one, DTYPES[dtype], layout=target.layout, alpha=1.0)
        types, snippet = _types(trained), None
        if trainer in SNIPPETS:
            snippet = SNIPPETS[trainer](folder.absolute() / file_name, given, types)
            write_text(partial / snippet.name, snippet.text)
            if trainer == "simpletuner":  # which reads its targets from a file of their own
                write_text(partial / "targets.json", json.dumps(types) + "\n")
        lines = _account(factors, kept, energies, trained, given)
        if dtype != "fp32":
            rounded = {n: LowRank(*(half.to(DTYPES[dtype]).float() for half in x)) for n, x in factors.items()}
            worst = max(relative_difference(x, rounded[n]) for n, x in factors.items() if n in short)
            lines.append(f"rounded to {dtype}: dW differs by {worst:.1%} at most")
        if recipe is None and snippet is not None:  # that the lines say what they should is part of the proof
            recipe = read_recipe(partial / snippet.name, trainer)
        verdict = judge(partial / file_name, trainer, modules, recipe)
        write_text(partial / "README.md", readme(trainer, file_name, extra, lines, snippet, given.rank))
    return Handoff(folder, folder / file_name, lines, verdict)


def _with_energy(
    metadata: Mapping[str, str], kept: Mapping[str, float], energies: Mapping[str, float]
) -> dict[str, str]:
    """With the share of the whole LoRA's energy that is left, in what the file says of its origin."""
    found = dict(metadata)
    if "warm_start" in found:
        origin = json.loads(found["warm_start"])
        left = sum(energies[module] * share for module, share in kept.items())
        share = left / (sum(energies.values()) or 1.0)
        origin["energy_kept"] = share * (1.0 if origin.get("energy_kept") is None else origin["energy_kept"])
        found["warm_start"] = json.dumps(origin)
    return found


def _types(modules: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The module types, in the order of a block; modules outside of blocks by their name."""
    ends = {name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in modules}
    order = {kind: number for number, kind in enumerate(TARGETS["all"])}
    return sorted(ends, key=lambda kind: (order.get(kind, len(order)), kind))


def _account(
    factors: Mapping[str, LowRank],
    kept: Mapping[str, float],
    energies: Mapping[str, float],
    trained: Sequence[str],
    recipe: Recipe,
) -> list[str]:
    """What became of the LoRA. kept: the share of each module's energy; energies: of all its modules."""
    total = sum(energies.values()) or 1.0
    lines = [f"{len(kept)} modules, rank {recipe.rank}, alpha {recipe.alpha:g}"]
    lost = sum(energies[module] * (1 - kept[module]) for module in kept) / total
    if lost > 5e-5:
        lines.append(f"truncated to the rank: {lost:.2%} of the energy is lost")
    if covered := [module for module in factors if module not in energies]:
        lines.append(f"covered with a random, b zero, because it is strict: {len(covered)} modules, as {covered[0]}")
    if open_ := [module for module in trained if module not in factors]:
        lines.append(f"trained and not in the LoRA, started by the trainer itself: {len(open_)} modules, as {open_[0]}")
    if dropped := [module for module in energies if module not in factors]:
        share = sum(energies[module] for module in dropped) / total
        types = ", ".join(_types(dropped))
        what = f"{len(dropped)} modules ({types}), with {share:.2%} of the energy"
        lines.append(f"dropped, because the recipe does not train them: {what}")
    return lines
