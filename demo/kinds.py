"""Measure kinds of adapter on creatures: python -m demo.kinds [--creatures 5] [--output outputs/kinds]

Each new creature is trained on as a LoRA, a LoHa and a LoKr, from `random` and from `i2l`, at three learning rates. The
table has the held-out stable loss relative to the base's: before the first step, and at its lowest, at the rate with
the lowest mean of it over the creatures; and the share of the seed's energy that the adapter keeps.

A run that is done is not done again. The report is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from demo import creatures
from demo.workbench import Workbench
from trainer import adapter, objective
from trainer.cli import guarded
from trainer.data.cache import key
from trainer.files import write_json, write_text

STEPS, EVERY = 60, 10
SETTINGS = (
    f"train.steps={STEPS}", f"validation.every={EVERY}", f"checkpoint.every={STEPS}", "train.batch_size=3",
    "validation.prompts=[]", "validation.unrelated_prompts=[]", "validation.num_pictures=6", "init.i2l.strength=1.0",
    "data.trigger=zorp",
)  # fmt: skip
STARTS = ("random", "i2l")
WIDE = "lokr, factor 2, rank 32"
WAYS = {
    "lora": ("adapter.kind=lora",),
    "loha": ("adapter.kind=loha",),
    "lokr": ("adapter.kind=lokr",),
    WIDE: ("adapter.kind=lokr", "adapter.lokr_factor=2", "adapter.rank=32"),
}
RATES = {
    ("lora", "random"): (1e-3, 3e-3, 1e-2), ("lora", "i2l"): (1e-4, 3e-4, 1e-3),
    ("loha", "random"): (3e-3, 1e-2, 3e-2), ("loha", "i2l"): (1e-4, 3e-4, 1e-3),
    ("lokr", "random"): (1e-3, 3e-3, 1e-2), ("lokr", "i2l"): (1e-3, 3e-3, 1e-2),
    (WIDE, "random"): (3e-3, 1e-2, 3e-2), (WIDE, "i2l"): (3e-4, 1e-3, 3e-3),
}  # fmt: skip
Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.kinds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=5, help="number of creatures (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/kinds"), help="folder of the report")
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.creatures, options.output))


def measure_all(count: int, output: Path) -> None:
    bench, rows = Workbench(output), list[Row]()
    numbers = range(creatures.FIRST_CREATURE, creatures.FIRST_CREATURE + count)
    cells = [
        (number, way, start, rate)
        for number, way, start in product(numbers, WAYS, STARTS)
        for rate in RATES[way, start]
    ]
    for number, way, start, rate in tqdm(cells, "runs", unit="run"):
        wanted = key(SETTINGS, WAYS[way], start, rate)
        file = output / "rows" / f"{_name(number, way, start, rate)}.json"
        if not file.exists() or json.loads(file.read_text(encoding="utf-8"))["key"] != wanted:
            write_json(file, {"key": wanted, **train(bench, number, way, start, rate)})
        rows.append(json.loads(file.read_text(encoding="utf-8")))
    write_json(output / "report.json", rows)
    write_text(output / "report.md", text := table(rows))
    print(text)


def _name(number: int, way: str, start: str, rate: float) -> str:
    return f"{number}-{way.replace(',', '').replace(' ', '-')}-{start}-{rate:g}"


def train(bench: Workbench, number: int, way: str, start: str, rate: float) -> dict[str, Any]:
    """A run of a creature: its losses relative to the base's."""
    subject = creatures.paint(bench.output / "creatures", "new", number)
    given = (f"data.held_out={subject / 'held_out'}", f"init.method={start}", f"train.learning_rate={rate}")
    prepared = bench.plan(_name(number, way, start, rate), subject, *given, *SETTINGS, *WAYS[way])
    encoded = bench.encode(prepared)
    base = objective.stable_losses(prepared, bench.transformer.eval(), encoded, bench.accelerator)["val_loss"]
    result, applied = bench.train(prepared, encoded, bench.seed(prepared, encoded), lambda step, tracker: {})
    curve = {str(point["step"]): point["val_loss"] / base for point in result.validations}
    return {"creature": number, "way": way, "start": start, "rate": rate, "curve": curve,
            "parameters": adapter.num_parameters(prepared.config.adapter, prepared.modules),
            "energy_kept": (applied["energy_kept"] or {}).get("total")}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Means over creatures with their standard deviations, as Markdown."""
    lines = ["| adapter | trained numbers | start | energy kept | before | lowest | at step | learning rate (others) |"]
    lines.append("|---" * 8 + "|")
    for way, start in product(WAYS, STARTS):
        by_rate = {
            rate: [row for row in rows if (row["way"], row["start"], row["rate"]) == (way, start, rate)]
            for rate in RATES[way, start]
        }
        lowest = {rate: [min(row["curve"].values()) for row in own] for rate, own in by_rate.items()}
        best = min(lowest, key=lambda rate: mean(lowest[rate]))
        own, others = by_rate[best], ", ".join(f"{rate:g}: {mean(lowest[rate]):.3f}" for rate in lowest if rate != best)
        energies = [row["energy_kept"] for row in own if row["energy_kept"] is not None]
        steps = mean(int(min(row["curve"], key=row["curve"].get)) for row in own)
        before = _spread([row["curve"]["0"] for row in own])
        lines.append(
            f"| {way} | {own[0]['parameters']:,} | {start} | {f'{100 * mean(energies):.1f} %' if energies else ''} | "
            f"{before} | {_spread(lowest[best])} | {steps:.0f} | {best:g} ({others}) |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)  # each run would say how it starts
    sys.exit(main())
