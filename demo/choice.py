"""Measure the choice of the best step: python -m demo.choice [--creatures 10] [--seeds 3] [--output outputs/choice]

New creatures of two tiers are trained on from `random` and from `i2l`. The step is chosen by three held-out pictures,
as every run does it, and judged by six others that the choice never sees. The table has how far above the lowest point
of that other curve each way to choose ends, in percent of it, and in brackets how often no farther than the last step;
also as if it had been chosen by two pictures:

    chosen        the step that the run exports
    lowest        the step with the lowest held-out loss, without a margin
    one error     the first step within a standard error of the lowest
    last          the end of the run

A run that is done is not done again: the command goes on where it was stopped. The report is written to
OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from demo import creatures, painter
from demo.workbench import Workbench
from trainer import choice, measure
from trainer.cli import guarded
from trainer.data.cache import key
from trainer.files import new_folder, write_json, write_text
from trainer.tracking import Tracker

TIERS: tuple[painter.Tier, ...] = ("new", "trait")
RATES = {"random": 1e-3, "i2l": 3e-4}  # about the best of each start
STEPS, EVERY = 160, 10
OTHERS = range(12, 18)  # scenes of the pictures that judge
SETTINGS = (
    f"train.steps={STEPS}", f"validation.every={EVERY}", "validation.prompts=[]", "validation.unrelated_prompts=[]",
    "validation.num_pictures=3", f"checkpoint.every={STEPS}", "init.i2l.strength=1.0", "data.trigger=zorp",
)  # fmt: skip
Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.choice", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=10, help="number of creatures in each tier (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each run (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("outputs/choice"), help="folder of the report")
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.output, options.creatures, options.seeds))


def measure_all(output: Path, count: int, seeds: int) -> None:
    bench, indices = Workbench(output), range(creatures.FIRST_CREATURE, creatures.FIRST_CREATURE + count)
    rows: list[Row] = []
    cells = [*product(indices, range(seeds), TIERS, RATES)]
    for index, seed, tier, start in tqdm(cells, "runs", unit="run"):
        file = output / "rows" / f"{tier}-{index}-{start}-{seed}.json"
        wanted = key(SETTINGS, RATES[start])
        if not file.exists() or json.loads(file.read_text(encoding="utf-8"))["key"] != wanted:
            write_json(file, {"key": wanted, **train(bench, tier, index, start, seed)})
        rows.append(json.loads(file.read_text(encoding="utf-8")))
    write_json(output / "report.json", rows)
    write_text(output / "report.md", text := table(rows))
    print(text)


def train(bench: Workbench, tier: painter.Tier, index: int, start: str, seed: int) -> dict[str, Any]:
    """The errors of both groups of pictures at each validation of a run."""
    subject, name = creatures.paint(bench.output / "creatures", tier, index), f"{tier}-{index}-{start}-{seed}"
    settings = (f"init.method={start}", f"seed={seed}", f"train.learning_rate={RATES[start]}", *SETTINGS)
    others = paint_others(bench.output / "others", tier, index)
    judging = bench.plan(f"{name}-judges", subject, f"data.held_out={others}", *settings)
    items = [bench.encode(judging).item(example) for example in judging.dataset.held_out]
    passes, judged = measure.Passes(bench.transformer, bench.accelerator, torch.float32, 12), dict[int, Tensor]()

    def judge(step: int, tracker: Tracker) -> Mapping[str, float]:
        judged[step] = passes.errors(items)[..., 0]
        return {"other_loss": float(judged[step].mean())}

    prepared = bench.plan(name, subject, f"data.held_out={subject / 'held_out'}", *settings)
    encoded = bench.encode(prepared)
    result, _ = bench.train(prepared, encoded, bench.seed(prepared, encoded), judge)
    errors = {str(step): values.tolist() for step, values in result.errors.items()}
    other = {str(step): values.tolist() for step, values in judged.items()}
    return {"tier": tier, "creature": index, "start": start, "seed": seed, "errors": errors, "other": other}


def paint_others(folder: Path, tier: painter.Tier, index: int) -> Path:
    """The same creature in other scenes than those that `creatures.paint` paints."""
    path = folder / tier / f"{index:03d}"
    if not path.exists():
        with new_folder(path) as partial:
            for number in OTHERS:
                where = painter.scene(number)
                Image.fromarray(painter.paint(painter.identity(tier, index), where)).save(partial / f"{number}.png")
                write_text(partial / f"{number}.txt", painter.caption(where))
    return path


# --- the table --------------------------------------------------------------------------------------------


def lowest(errors: choice.Errors) -> int:
    return min(errors, key=lambda step: float(errors[step].mean()))


def one_error(errors: choice.Errors) -> int:
    best = lowest(errors)
    near = [choice.difference(values, errors[best]) for values in errors.values()]
    return next(step for step, (higher, error) in zip(errors, near, strict=True) if higher <= error)


def chosen(errors: choice.Errors) -> int:
    found = choice.choose(errors)
    assert found is not None
    return found.step


WAYS: dict[str, Callable[[choice.Errors], int]] = {
    "chosen": chosen, "lowest": lowest, "one error": one_error, "last": lambda errors: max(errors)
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Means over creatures and seeds, as Markdown."""
    lines = ["| chosen by | tier | start | runs | " + " | ".join(WAYS) + " |", "|---" * (4 + len(WAYS)) + "|"]
    for count, tier, start in product((3, 2), TIERS, RATES):
        own = [row for row in rows if (row["tier"], row["start"]) == (tier, start)]
        if own:
            cells = [_cell(own, way, count) for way in WAYS]
            lines.append(f"| {count} pictures | {tier} | {start} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[Row], way: str, count: int) -> str:
    above = [_above(row, way, count) for row in rows]
    ends = [_above(row, "last", count) for row in rows]
    text = f"+{mean(above):.1%}"
    if way == "last":
        return text
    no_farther = sum(one <= end for one, end in zip(above, ends, strict=True))
    return f"{text} ({no_farther})"


def _above(row: Row, way: str, count: int) -> float:
    """How far the loss of the other pictures, at the step chosen by so many held-out ones, is above the lowest of their
    curve, relative to it."""
    errors = {int(step): torch.tensor(values[:count]) for step, values in row["errors"].items()}
    other = {int(step): float(torch.tensor(values).mean()) for step, values in row["other"].items()}
    return other[WAYS[way](errors)] / min(other.values()) - 1


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)  # each run would say how it starts
    sys.exit(main())
