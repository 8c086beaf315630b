"""What a comparison's curves say: pure functions on numbers.

A *run* is a mapping with `group`, `subject`, `arm`, `learning_rate`, `seed`, `init_seconds` (what the start would cost
alone, or None) and `curve`: points with `step`, `val_loss` and `seconds`, the first at step 0. Every arm is taken at
its own best learning rate: a start that suits a low rate would otherwise look good, or bad, only for the rate that was
chosen (arXiv:2602.04998).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One subject and seed from one start, at that start's best learning rate."""

    group: str
    subject: str
    arm: str
    seed: int
    learning_rate: float
    step_0: float
    best: float
    best_step: int
    end: float
    area: float
    """Under the curve, divided by the number of steps: the mean loss along the run."""
    baseline_best: float
    baseline_step: int
    baseline_area: float
    steps: int | None
    """At the first validation that is at or below the baseline's best; None if there is none."""
    start_seconds: float | None
    """What the start would cost alone; None if it was not measured, and then no number of seconds is known."""
    seconds: float | None
    """As `steps`, in seconds of training, with the start's."""
    baseline_seconds: float | None
    length: int
    """Steps of the run."""
    length_seconds: float | None


def best_rates(runs: Sequence[Run]) -> dict[tuple[str, str], float]:
    """(subject, arm) -> the learning rate whose curves have the lowest best, on average over seeds; of those with the
    most seeds, since a rate at which some of the runs failed is none to take."""
    bests: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        lowest = min(point["val_loss"] for point in run["curve"])
        bests[run["subject"], run["arm"]][run["learning_rate"]].append(lowest)
    return {
        name: min(rates, key=lambda rate: (-len(rates[rate]), mean(rates[rate]), rate)) for name, rates in bests.items()
    }


def outcomes(runs: Sequence[Run], baseline: str) -> list[Outcome]:
    """The outcome of every subject, arm and seed, compared with the baseline's run with the same seed; without such a
    run there is none."""
    rates = best_rates(runs)
    chosen = {
        (run["subject"], run["arm"], run["seed"]): run
        for run in runs
        if run["learning_rate"] == rates[run["subject"], run["arm"]]
    }
    found = []
    for (subject, arm, seed), run in chosen.items():
        if (reference := chosen.get((subject, baseline, seed))) is None:
            continue
        goal, curve = _best(reference["curve"]), run["curve"]
        best = _best(curve)
        reached = next((point for point in curve if point["val_loss"] <= goal["val_loss"]), None)
        found.append(
            Outcome(
                group=run["group"],
                subject=subject,
                arm=arm,
                seed=seed,
                learning_rate=run["learning_rate"],
                step_0=curve[0]["val_loss"],
                best=best["val_loss"],
                best_step=best["step"],
                end=curve[-1]["val_loss"],
                area=area(curve),
                baseline_best=goal["val_loss"],
                baseline_step=goal["step"],
                baseline_area=area(reference["curve"]),
                steps=reached["step"] if reached else None,
                start_seconds=run["init_seconds"],
                seconds=_with_start(run, reached["seconds"]) if reached else None,
                baseline_seconds=_with_start(reference, goal["seconds"]),
                length=curve[-1]["step"],
                length_seconds=_with_start(run, curve[-1]["seconds"]),
            )
        )
    return found


def _with_start(run: Run, seconds: float) -> float | None:
    return None if run["init_seconds"] is None else float(run["init_seconds"] + seconds)


def _best(curve: Sequence[Mapping[str, float]]) -> Mapping[str, Any]:
    return min(curve, key=lambda point: (point["val_loss"], point["step"]))


def area(curve: Sequence[Mapping[str, float]]) -> float:
    """The mean height of a curve: its area by the trapezoidal rule over the number of steps; of one point, its
    value."""
    if len(curve) == 1:
        return curve[0]["val_loss"]
    parts = [(y["step"] - x["step"]) * (x["val_loss"] + y["val_loss"]) / 2 for x, y in pairwise(curve)]
    return sum(parts) / (curve[-1]["step"] - curve[0]["step"])


@dataclass(frozen=True)
class Interval:
    """A value over all subjects and seeds, with the bounds in which 95 % of resamples lie."""

    value: float | None
    low: float | None
    high: float | None


def interval(rows: Sequence[Outcome], statistic: Callable[[Sequence[Outcome]], float]) -> Interval:
    """Bootstrap over subjects, and within each over its seeds: pictures of one subject are no independent evidence.
    `statistic` may give NaN or infinity: such a bound is None."""
    by_subject: dict[str, list[Outcome]] = defaultdict(list)
    for row in rows:
        by_subject[row.subject].append(row)
    groups = list(by_subject.values())
    random = np.random.default_rng(0)
    values = []
    for _ in range(NUM_RESAMPLES):
        drawn = [groups[i] for i in random.integers(len(groups), size=len(groups))]
        values.append(statistic([group[i] for group in drawn for i in random.integers(len(group), size=len(group))]))
    low, high = np.percentile(values, INTERVAL) if np.isfinite(values).all() else (np.nan, np.nan)
    return Interval(*(float(x) if np.isfinite(x) else None for x in (statistic(rows), low, high)))


def summarise(rows: Sequence[Outcome]) -> dict[str, Any]:
    """The results of one arm in one group, compared with the baseline.

    `steps` is the ratio of all steps that the arm needed to reach the baseline's best to all that the baseline itself
    needed. Where it never got there its whole run is counted: then `never` is above 0, and the ratio a lower bound.
    `seconds` has no value if one of the starts was not measured; `seconds_known` says so.
    """
    return {
        "subjects": len({row.subject for row in rows}),
        "runs": len(rows),
        "below_at_step_0": sum(row.steps == 0 for row in rows),
        "never": sum(row.steps is None for row in rows),
        "start_seconds": _mean_or_none([row.start_seconds for row in rows]),
        "seconds_known": all(row.length_seconds is not None and row.baseline_seconds is not None for row in rows),
        "steps": asdict(interval(rows, _steps_ratio)),
        "seconds": asdict(interval(rows, _seconds_ratio)),
        "best_lower_by": asdict(interval(rows, lambda some: mean(gain(row) for row in some))),
        "best_lower_by_range": [min(map(gain, rows)), max(map(gain, rows))],
        "area_ratio": asdict(interval(rows, lambda some: mean(row.area / row.baseline_area for row in some))),
        "step_0": mean(row.step_0 for row in rows),
        "best": mean(row.best for row in rows),
        "best_step": mean(row.best_step for row in rows),
        "end": mean(row.end for row in rows),
    }


def gain(row: Outcome) -> float:
    """How much lower its best is than the baseline's, as a share."""
    return 1 - row.best / row.baseline_best


def _steps_ratio(rows: Sequence[Outcome]) -> float:
    needed = sum(row.length if row.steps is None else row.steps for row in rows)
    return _ratio(needed, sum(row.baseline_step for row in rows))


def _seconds_ratio(rows: Sequence[Outcome]) -> float:
    needed, baseline = 0.0, 0.0
    for row in rows:
        if row.length_seconds is None or row.baseline_seconds is None:
            return float("nan")
        needed += row.length_seconds if row.seconds is None else row.seconds
        baseline += row.baseline_seconds
    return _ratio(needed, baseline)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _ratio(x: float, y: float) -> float:
    return x / y if y else float("nan")
