"""The weighted sum of LoRAs as one LoRA: `python -m trainer.formats merge`, `subtract`.

    dW = w1 dW1 + w2 dW2 + ...

Factors concatenated on rank are that sum exactly, with each weight on one factor alone: (w1 b1 | w2 b2) (a1 / a2). A
weight on both factors would act squared, and factors that are added instead would bring products of one LoRA's b with
another's a, which belong to neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.adapter import AdapterWeights
from trainer.config import ConfigError
from trainer.files import content_hash
from trainer.formats.layouts import module_types
from trainer.formats.lora import MOST_RANK, FormatError, LoraFile, open_lora
from trainer.formats.origin import TRIGGER, without_stale
from trainer.formats.written import Account, Form, write
from trainer.hardware.threads import parallel_map
from trainer.lowrank import (
    RESOLUTION,
    LowRank,
    concatenate,
    energy,
    norm,
    ranks_for_energy,
    scale,
    truncate,
    zeros,
)

Weighted = tuple[Mapping[str, LowRank], float]
"""Effective factors of a LoRA by module, and its weight."""


@dataclass(frozen=True)
class Part:
    """A LoRA of the sum."""

    path: Path
    """As it was given."""
    weight: float
    file: LoraFile


def merge(paths: Sequence[Path], weights: Sequence[str] | None, form: Form) -> None:
    """Write the sum of the LoRAs, each times its weight (by default 1), and print what is in it.

    ConfigError lists all that is wrong with arguments and headers, before a tensor is read.
    """
    parts = check(paths, weights, form)
    for part in parts:
        for note in part.file.notes:
            print(f"note: {part.path}: {note}")
    for line in _unshared(parts):
        print(line)
    read = [part.file.read(MOST_RANK) for part in parts]
    sum_of = [_told(part, own) for part, (own, _) in zip(parts, read, strict=True)]
    loras = [(own.factors, part.weight) for part, (own, _) in zip(parts, read, strict=True)]
    factors, account = _truncated(loras, _rank(loras, form), form.quiet)
    metadata = [own for _, own in read]
    triggers = dict.fromkeys(own[TRIGGER] for own in metadata if own.get(TRIGGER))
    entries = {**_alike(metadata), **({TRIGGER: ", ".join(triggers)} if triggers else {})}
    write(form, factors, account, {"sum_of": sum_of}, entries)


def check(paths: Sequence[Path], weights: Sequence[str] | None, form: Form) -> list[Part]:
    """The LoRAs by their headers. ConfigError lists all that is wrong."""
    problems = form.problems()
    numbers = [1.0] * len(paths) if weights is None else [_number(text, problems) for text in weights]
    if len(numbers) != len(paths):
        problems.append(f"--weights: {len(numbers)} for {len(paths)} files; give one for each file, in their order")
    files = dict[Path, LoraFile]()
    for path in dict.fromkeys(paths):
        try:
            files[path] = open_lora(path)
        except FormatError as error:
            problems.append(str(error))
    problems += _misfits(files)
    if problems:
        raise ConfigError(problems)
    return [Part(path, weight, files[path]) for path, weight in zip(paths, numbers, strict=True)]


def _number(text: str, problems: list[str]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problems.append(f'--weights: "{text}" is no finite number: write one such as 0.7')
    elif number == 0:
        problems.append(f"--weights: {text} has no effect: leave the file out")
    return number


def _misfits(files: Mapping[Path, LoraFile]) -> list[str]:
    """A problem for each file in which modules have another size than in the first of the others that has them."""
    problems, known = [], dict[str, tuple[Path, tuple[int, int]]]()
    for path, file in files.items():
        sizes = {name: (size[0], size[1]) for name, size in file.sizes().items()}
        wrong = [name for name, size in sizes.items() if name in known and known[name][1] != size]
        if wrong:
            name, (other, size) = wrong[0], known[wrong[0]]
            count = f"{len(wrong)} of its {len(sizes)} modules"
            problems.append(
                f"{path} was made for another model than {other}: {count} have another size; "
                f"{name} is {sizes[name][0]} -> {sizes[name][1]}, and there {size[0]} -> {size[1]}"
            )
        else:
            known = {name: (path, size) for name, size in sizes.items()} | known
    return problems


def _unshared(parts: Sequence[Part]) -> list[str]:
    """A line on the modules of each set of files that are not in the others."""
    holders = dict[tuple[str, ...], list[str]]()
    for name in dict.fromkeys(name for part in parts for name in part.file.modules):
        own = tuple(dict.fromkeys(str(part.path) for part in parts if name in part.file.modules))
        holders.setdefault(own, []).append(name)
    everywhere = {str(part.path) for part in parts}
    return [
        f"only in {' and '.join(own)}: {len(names)} modules ({', '.join(module_types(names))})"
        for own, names in holders.items()
        if {*own} != everywhere
    ]


def _told(part: Part, weights: AdapterWeights) -> dict[str, Any]:
    """A part for the metadata; what is lost of a LoHa or LoKr is printed, too."""
    found = {"file": part.path.name, "sha256": content_hash(part.file.path), "weight": part.weight}
    if any(weights.lost.values()):
        found["energy_read"] = weights.kept()["total"]
        at = f"read at rank {MOST_RANK}, with {found['energy_read']:.2%} of its energy"
        print(f"{part.path} is a {part.file.method}: {at}; what follows is of that")
    return found


def _sum(loras: Sequence[Weighted], name: str) -> LowRank:
    """The sum of one module; of rank 0 if the parts cancel one another, which leaves nothing but rounding."""
    own = [scale(factors[name], weight) for factors, weight in loras if name in factors]
    found = concatenate(own)
    if norm(found) <= RESOLUTION * sum(map(norm, own)):
        return zeros(found.a.shape[1], found.b.shape[0])
    return found


def _rank(loras: Sequence[Weighted], form: Form) -> int | None:
    """What all modules are truncated to; None if nothing is."""
    if form.energy is None:
        return form.rank
    bar = tqdm(_names(loras), desc="singular values", unit="module", leave=False, disable=form.quiet or None)
    return ranks_for_energy(((name, _sum(loras, name)) for name in bar), form.energy)[0]


def _truncated(loras: Sequence[Weighted], rank: int | None, quiet: bool) -> tuple[dict[str, LowRank], Account]:
    """The sum of each module, at most at this rank, and what is kept of it."""

    def fit(name: str) -> tuple[LowRank, float, float]:
        whole = _sum(loras, name)  # here, one by one: all sums at once would double the memory
        return *((whole, 1.0) if rank is None else truncate(whole, rank)), energy(whole)

    factors, account, names = dict[str, LowRank](), Account(), _names(loras)
    bar = tqdm(names, desc="merging", unit="module", leave=False, disable=quiet or None)
    for name, (own, kept, size) in zip(names, parallel_map(fit, bar), strict=True):
        factors[name], account.kept[name], account.energies[name] = own, kept, size
    return factors, account


def _names(loras: Sequence[Weighted]) -> list[str]:
    return [*dict.fromkeys(name for factors, _ in loras for name in factors)]


def _alike(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the metadata of all files says alike, but for what speaks of one of them."""
    first, *others = map(without_stale, found)
    return {
        key: value
        for key, value in first.items()
        if not key.startswith("warm_start") and all(other.get(key) == value for other in others)
    }
