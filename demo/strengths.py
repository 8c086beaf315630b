"""Measure ways to choose the strength of a seed: python -m demo.strengths SUBJECTS [--train]

SUBJECTS is what `python -m demo.creatures` has painted. Each way chooses by losses on a subject's training pictures,
each with the seed that the other pictures give, and differs in how many it computes. What it chooses is judged by the
held-out stable loss with the whole seed at that strength, truncated to the rank of configs/creatures.toml, beside the
best of a fine grid of strengths. Subjects of the tier "new" are also tried with the pictures of the next one. With
--train, runs of 100 steps start from the strengths that the first way and "auto" choose, where they differ.

The report is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from demo.experts import DEVICE, NOISE_SEEDS
from demo.workbench import Workbench
from initializers.i2l import initializer as i2l
from initializers.i2l.predictions import predict_pictures
from trainer import adapter, plan, run, validation
from trainer.adapter import AdapterWeights
from trainer.cli import guarded
from trainer.files import read_json, write_json, write_text
from trainer.lowrank import LowRank, scale, truncate
from trainer.validation import NUM_SIGMAS

TRIED = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
GRID = tuple(round(0.05 * i, 2) for i in range(26))
RATES = (3e-4, 1e-3)
RUN = ("train.steps=100", "validation.every=10", "validation.prompts=[]", "validation.unrelated_prompts=[]")
AUTO = '"auto": three, a parabola'


@dataclass(frozen=True)
class Way:
    """How a strength is chosen."""

    strengths: tuple[float, ...]
    pictures: int | None = None
    """So many share the sigmas among them; None: all pictures at all sigmas."""
    parabola: bool = False
    """Its minimum is taken, not the best of the strengths."""

    def passes(self, num_pictures: int) -> int:
        """Forward passes of the transformer."""
        return len(self.strengths) * NUM_SIGMAS * (num_pictures if self.pictures is None else 1)

    def __call__(self, errors: NDArray[Any]) -> float:
        """errors: pictures, strengths of TRIED, sigmas."""
        rows = [TRIED.index(strength) for strength in self.strengths]
        if self.pictures is None:
            losses = errors.mean((0, 2))[rows]
        else:
            tried = i2l._spread(len(errors), self.pictures)
            losses = np.mean([errors[tried[s % len(tried)], rows, s] for s in range(NUM_SIGMAS)], 0)
        if not self.parabola:
            return self.strengths[int(losses.argmin())]
        return round(0.05 * round(i2l.lowest(self.strengths, losses.tolist()) / 0.05), 2)


WAYS = {
    "six, the best": Way(TRIED),
    "six, a parabola": Way(TRIED, parabola=True),
    "five, the best": Way(TRIED[:5], 4),
    "0, 0.5, 1, a parabola": Way((0.0, 0.5, 1.0), 4, parabola=True),
    AUTO: Way(i2l.STRENGTHS, i2l.MAX_TRIALS, parabola=True),
    "the same on two pictures": Way(i2l.STRENGTHS, 2, parabola=True),
}
FULL = next(iter(WAYS))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.strengths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", type=Path, help="folder of folders of pictures")
    parser.add_argument("--train", action="store_true", help="short runs, too")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/strengths"), help="folder of the report (outputs/strengths)"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.subjects, options.output, train=options.train))


def measure_all(subjects: Path, output: Path, *, train: bool) -> None:
    folders = sorted(path.parent for path in subjects.glob("*/*/held_out"))
    new = [folder for folder in folders if folder.parent.name == "new"]
    pairs = [(folder, folder) for folder in folders]
    pairs += [(folder, new[(place + 1) % len(new)]) for place, folder in enumerate(new)]
    base = _Base(output)
    rows = [base.measure(subject, shown) for subject, shown in tqdm(pairs, "subjects", unit="subject")]
    text, runs = table(rows), list[dict[str, Any]]()
    changed = [row for row in rows if row["pictures"] != "wrong" and row["taken"][FULL] != row["taken"][AUTO]]
    if train and changed:
        for row, name, rate in tqdm([*product(changed, (FULL, AUTO), RATES)], "runs", unit="run"):
            curve = base.train(subjects / row["subject"], row["taken"][name], rate)
            runs.append({"subject": row["subject"], "way": name, "rate": rate, "curve": curve})
        text += "\n" + run_table(changed, runs)
    write_json(output / "report.json", {"rows": rows, "runs": runs})
    write_text(output / "report.md", text)
    print(text)


class _Base:
    """The demo's base, on which seeds are measured one after another."""

    def __init__(self, output: Path):
        self._bench = Workbench(output)
        self._transformer = self._bench.transformer

    def _plan(self, name: str, subject: Path, *overrides: str) -> plan.Plan:
        given = (f"data.held_out={subject / 'held_out'}", "init.method=i2l", *overrides)
        return self._bench.plan(name, subject, *given)

    def measure(self, subject: Path, shown: Path) -> dict[str, Any]:
        """Errors with the seeds of the pictures in `shown`, what each way chooses by them, and held-out losses."""
        prepared, bench = self._plan("plan", subject), self._bench
        encoded = bench.encode(prepared)
        trials = bench.trials(prepared, encoded)
        context = run.init_context(prepared, DEVICE, trials, bench.text_encoder)
        context = replace(context, images=tuple(sorted(shown.glob("*.png"))), log=lambda message: None)
        options = prepared.start.options
        located = i2l._locate(context, options)
        predictions = predict_pictures(context, options.encoders, located, context.images, {})
        numbers = range(len(context.images))
        errors = torch.zeros(len(numbers), len(TRIED), NUM_SIGMAS)
        for i in numbers:
            whole = dict(predictions.combine({}, [other for other in numbers if other != i]))
            for j, strength in enumerate(TRIED):
                errors[i, j] = trials(_at(whole, strength), i, range(NUM_SIGMAS))
        whole = {name: truncate(x, context.rank)[0] for name, x in predictions.combine({}, numbers).items()}
        items = [encoded.item(example) for example in prepared.dataset.held_out]
        taken = {name: way(errors.numpy()) for name, way in WAYS.items()}
        return {
            "subject": f"{subject.parent.name}/{subject.name}",
            "pictures": "wrong" if shown != subject else subject.parent.name,
            "num_pictures": len(numbers),
            "taken": taken,
            "auto": i2l.initialize(context, replace(options, strength="auto")).report["strength"],
            "held_out": {strength: self._loss(_at(whole, strength), items) for strength in {*GRID, *taken.values()}},
        }

    def _loss(self, weights: AdapterWeights, items: Sequence[validation.Item]) -> float:
        handles = adapter.attach_frozen(self._transformer, weights) if weights.factors else []
        try:
            return mean(
                float(validation.stable_errors(self._transformer, items, DEVICE, torch.float32, seed=seed).mean())
                for seed in NOISE_SEEDS
            )
        finally:
            for handle in handles:
                handle.remove()

    def train(self, subject: Path, strength: float, rate: float) -> list[float]:
        """The held-out losses of a run from that strength."""
        name = f"{subject.parent.name}-{subject.name}-{strength:g}-{rate:g}"
        prepared = self._plan(name, subject, *RUN, f"init.i2l.strength={strength}", f"train.learning_rate={rate}")
        run.execute(prepared, resume=False, quiet=True)
        report: dict[str, Any] = read_json(prepared.output / "run.json")
        return [point["val_loss"] for point in report["validations"]]


def _at(whole: Mapping[str, LowRank], strength: float) -> AdapterWeights:
    return AdapterWeights({name: scale(x, strength) for name, x in whole.items()} if strength else {})


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each way, as Markdown."""
    kinds = [*dict.fromkeys(row["pictures"] for row in rows)]
    heads = [f"{kind}: strengths, above the best" for kind in kinds]
    lines = ["| strengths tried | forward passes | " + " | ".join([*heads, "against the first way"]) + " |"]
    lines.append("|---" * (len(kinds) + 3) + "|")
    for name, way in WAYS.items():
        cells = [name, str(way.passes(rows[0]["num_pictures"]))]
        for kind in kinds:
            own = [row for row in rows if row["pictures"] == kind]
            taken = [row["taken"][name] for row in own]
            above = [_loss_of(row, name) / min(row["held_out"].values()) - 1 for row in own]
            cells.append(f"{min(taken):g} to {max(taken):g}: {mean(above):.1%} ({max(above):.1%})")
        right = [row for row in rows if row["pictures"] != "wrong"]
        cells.append(paired([_loss_of(row, name) / _loss_of(row, FULL) - 1 for row in right]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _loss_of(row: Mapping[str, Any], name: str) -> float:
    return float(row["held_out"][row["taken"][name]])


def run_table(rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs from both strengths, each at its own best rate, as Markdown."""
    lines = ["| subject | strengths | best held-out loss | end |", "|---|---|---|---|"]
    differences: dict[str, list[float]] = {"best": [], "end": []}
    ends: dict[str, Callable[[Sequence[float]], float]] = {"best": min, "end": lambda curve: curve[-1]}
    for row in rows:
        cells = {}
        for name in (FULL, AUTO):
            own = [one["curve"] for one in runs if (one["subject"], one["way"]) == (row["subject"], name)]
            cells[name] = min(own, key=min)
        words = [row["subject"], f"{row['taken'][FULL]:g}, {row['taken'][AUTO]:g}"]
        for what, of in ends.items():
            before, after = of(cells[FULL]), of(cells[AUTO])
            differences[what].append(after / before - 1)
            words.append(f"{before:.4f}, {after:.4f}")
        lines.append("| " + " | ".join(words) + " |")
    lines.append(f"| all {len(lines) - 2} | | {paired(differences['best'])} | {paired(differences['end'])} |")
    return "\n".join(lines) + "\n"


def paired(differences: Sequence[float]) -> str:
    """Mean and worst of relative differences, how many are lower and higher, and the sign test of that, two-sided."""
    lower, higher = sum(x < 0 for x in differences), sum(x > 0 for x in differences)
    count = lower + higher
    tail = sum(math.comb(count, i) for i in range(min(lower, higher) + 1)) / 2**count
    p = min(1, 2 * tail)
    return f"{mean(differences):+.2%} ({max(differences):+.2%}), {lower} lower, {higher} higher, p = {p:.2f}"


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)  # each run would say how it starts
    sys.exit(main())
