"""The table of pictures: what the model's errors on each of them say."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from trainer.diagnosis import THRESHOLD
from trainer.page.charts import bars
from trainer.page.left import Errors, Key, Left, number
from trainer.page.pictures import Album, Shown, caption

MAX_THUMBNAILS = 100
PARTS = {"train": "training", "held_out": "held out"}
SCORE = "score"  # the number of a diagnosis that no other column has


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None
    """To sort by."""


@dataclass(frozen=True)
class Row:
    picture: str
    part: str
    caption: str
    thumbnail: Shown | None
    cells: list[Cell]
    bars: list[tuple[float, float]]
    """The profile by sigma: now, and before training."""
    profile: str


@dataclass(frozen=True)
class Doubtful:
    """A picture with what the diagnosis says of it."""

    picture: str
    part: str
    caption: str
    thumbnail: Shown | None
    reasons: list[str]


@dataclass(frozen=True)
class Table:
    columns: list[tuple[str, str]]
    """Headers with what they mean."""
    rows: list[Row]


def table(left: Left, album: Album) -> Table:
    """The pictures with a measured error, those first that the diagnosis doubts; columns that no row has are left
    out."""
    entries, doubts = dict(left.pictures()), _doubts(left)
    places = {name: place for place, name in enumerate(doubts)}
    keys = sorted(left.errors, key=lambda key: places.get(key[1], len(places)))
    columns, cells = list[tuple[str, str]](), {key: list[Cell]() for key in keys}
    for header, told, found in [*_measured(left, keys), *_of_the_diagnosis(keys, doubts)]:
        if any(cell.value is not None for cell in found.values()):
            columns.append((header, told))
            for key, cell in found.items():
                cells[key].append(cell)
    rows = []
    for place, key in enumerate(keys):
        shown = album.thumbnail(key) if place < MAX_THUMBNAILS else None
        profile = _profile(left.errors[key], left.chosen)
        rows.append(Row(key[1], PARTS.get(key[0], key[0]), caption(entries.get(key, {})), shown, cells[key], *profile))
    return Table(columns, rows)


def doubtful(left: Left, album: Album) -> list[Doubtful]:
    """The pictures that the diagnosis has something to say of, the most doubtful one first."""
    entries = {key[1]: (key, entry) for key, entry in left.pictures()}
    found = list[Doubtful]()
    for name, doubt in _doubts(left).items():
        reasons = doubt.get("reasons")
        if isinstance(reasons, list) and reasons:
            key, entry = entries.get(name, (("train", name), {}))
            shown = album.thumbnail(key) if len(found) < MAX_THUMBNAILS else None
            found.append(Doubtful(name, PARTS[key[0]], caption(entry), shown, [str(reason) for reason in reasons]))
    return found


def _doubts(left: Left) -> dict[str, dict[str, Any]]:
    return {str(doubt.get("picture", "")): doubt for doubt in left.doubts}


Found = Iterator[tuple[str, str, dict[Key, Cell]]]
"""The header of a column, what it means, and its cells."""


def _measured(left: Left, keys: list[Key]) -> Found:
    curves = {key: _means(left.errors[key], "adapter") for key in keys}
    steps = sorted({step for curve in curves.values() for step in curve})
    first, last = (steps[0], steps[-1]) if steps else (0, 0)
    now = left.chosen if left.chosen in steps else last
    base = {key: _only(left.errors[key], "base") for key in keys}
    yield "base", "The error of the base without any LoRA.", {key: _error(base[key]) for key in keys}
    for step in sorted({first, now, last}) if steps else ():
        header = f"step {step}" + (" (chosen)" if step == left.chosen else "")
        yield header, f"The error at step {step}.", {key: _error(curves[key].get(step)) for key in keys}
    if now != first:
        told = f"How much the error has changed from step {first} to step {now}."
        yield "change", told, {key: _change(curves[key].get(first), curves[key].get(now)) for key in keys}
        told = "The first validation at which the error had fallen by half of all that it has fallen."
        yield "half learned", told, {key: _step(half_learned(curves[key])) for key in keys}
    told = "How much higher the base's error is with an empty prompt: little if the caption does not fit."
    yield "caption helps", told, {key: _change(base[key], _only(left.errors[key], "no caption")) for key in keys}
    told = "How much the seed that i2L makes of the other pictures changes the base's error: they help below 0."
    yield "others' seed", told, {key: _change(base[key], _only(left.errors[key], "others' seed")) for key in keys}


def _of_the_diagnosis(keys: list[Key], doubts: Mapping[str, Mapping[str, Any]]) -> Found:
    values = {key: number(doubts.get(key[1], {}).get(SCORE)) for key in keys}
    if any(value is not None for value in values.values()):
        meaning = (
            f"How doubtful it is, in about standard deviations of the pictures; from {THRESHOLD:g} on it is named."
        )
        yield SCORE, meaning, {k: Cell("" if value is None else f"{value:.1f}", value) for k, value in values.items()}


def _means(errors: Errors, what: str) -> dict[int, float]:
    return {step: mean(values) for step, values in sorted(errors.get(what, {}).items())}


def _only(errors: Errors, what: str) -> float | None:
    """The mean of what is measured once."""
    return next(iter(_means(errors, what).values()), None)


def half_learned(curve: Mapping[int, float]) -> int | None:
    """The first step at which an error has fallen by half of what it falls from the first step to its lowest; None if
    that is less than a hundredth of it."""
    if not curve:
        return None
    first, lowest = curve[min(curve)], min(curve.values())
    if first - lowest < 0.01 * first:
        return None
    return next(step for step in sorted(curve) if curve[step] <= (first + lowest) / 2)


def _error(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.4f}", value)


def _change(before: float | None, after: float | None) -> Cell:
    if before is None or after is None or before <= 0:
        return Cell("", None)
    return Cell(f"{100 * (after / before - 1):+.1f} %", after / before - 1)


def _step(step: int | None) -> Cell:
    return Cell("" if step is None else f"step {step}", step)


def _profile(errors: Errors, chosen: int | None) -> tuple[list[tuple[float, float]], str]:
    """Errors by sigma, now and before, as bars and in words."""
    curve = errors.get("adapter") or errors.get("base") or {}
    if not curve:
        return [], ""
    step = chosen if chosen in curve else max(curve)
    now, before = curve[step], curve[min(curve)]
    shown = ", ".join(f"{(i + 0.5) / len(now):.2f}: {value:.3f}" for i, value in enumerate(now))
    return bars(now, before), f"Errors by sigma at step {step}: {shown}"
