"""What a run has left in its folder so far. Nothing here fails because a file is missing, cut short or of another form:
what cannot be read is not there."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from trainer.folder import RUN_FILE

LARGEST = sys.float_info.max  # JSON has integers that no float can hold
Key = tuple[str, str]
"""A part, "train" or "held_out", and the name of a picture in it."""
Errors = dict[str, dict[int, list[float]]]
"""What was measured ("adapter", "base", ...) -> step -> the stable errors of a picture, by sigma."""


@dataclass(frozen=True)
class Left:
    folder: Path
    report: dict[str, Any]
    """run.json"""
    steps: list[tuple[int, dict[str, float]]]
    """The numbers of each step in metrics.jsonl."""
    validations: dict[int, dict[str, float]]
    """Step -> the numbers of its validation."""
    errors: dict[Key, Errors]
    choice: dict[str, Any]
    doubts: list[dict[str, Any]]
    """diagnosis.json: the pictures, the most doubtful one first."""

    @property
    def chosen(self) -> int | None:
        step = self.choice.get("step")
        return step if isinstance(step, int) else None

    @property
    def step(self) -> int:
        """The last one that is done."""
        return max([step for step, _ in self.steps[-1:]] + [*self.validations], default=0)

    @property
    def running(self) -> bool:
        return self.report.get("status") == "running"

    def curve(self, name: str) -> list[tuple[float, float]]:
        """A number of the validations over their steps."""
        return [(step, values[name]) for step, values in self.validations.items() if name in values]

    def pictures(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """What run.json says of each picture, held-out ones last."""
        for part in ("train", "held_out"):
            for entry in entries(at(self.report, "data", part)):
                yield (part, str(entry.get("picture", ""))), entry


def read(folder: Path) -> Left:
    report = _table(folder / RUN_FILE)
    steps, validations = dict[int, dict[str, float]](), defaultdict[int, dict[str, float]](dict)
    for step, line in _lines(folder / "metrics.jsonl"):
        values = {name: value for name, found in line.items() if (value := number(found)) is not None}
        if "loss" in line:
            steps[step] = values
        else:
            validations[step] |= values  # what is measured later has a line of its own
    errors = defaultdict[Key, Errors](lambda: defaultdict(dict))
    for step, line in _lines(folder / "pictures.jsonl"):
        by_sigma = [value for value in numbers(line.get("errors")) if value is not None]
        if by_sigma and len(by_sigma) == len(line["errors"]):
            key = str(line.get("part", "train")), str(line.get("picture", ""))
            errors[key][str(line.get("what", "adapter"))][step] = by_sigma
    return Left(
        folder,
        report,
        sorted(steps.items()),
        dict(sorted(validations.items())),
        dict(errors),
        _table(folder / "choice.json"),
        entries(_table(folder / "diagnosis.json").get("pictures")),
    )


def _table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a file of JSON with their steps; the last one may be half written."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    for line in data.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int) and number(found["step"]) is not None:
            yield found["step"], found


def at(value: Any, *keys: str) -> Any:
    """value[key][key]..., or None if one of them is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def table_at(value: Any, *keys: str) -> Mapping[str, Any]:
    """The same if it is a table, else an empty one."""
    found = at(value, *keys)
    return found if isinstance(found, Mapping) else {}


def entries(value: Any) -> list[dict[str, Any]]:
    """The tables in a list; none if it is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return float(value)


def numbers(value: Any) -> list[float | None]:
    """The finite numbers of a list, and None for what else is in it."""
    return [number(one) for one in value] if isinstance(value, list) else []


def mean_error(errors: Mapping[Key, Errors], part: str, what: str, step: int) -> float | None:
    """The mean over the pictures of a part; None if it was not measured."""
    found = [
        mean(by_step[step])
        for (where, _), kinds in errors.items()
        if where == part and step in (by_step := kinds.get(what, {}))
    ]
    return mean(found) if found else None
