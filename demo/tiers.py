"""i2L against a random start on held-out creatures: python -m demo.tiers [--creatures 10]

For creatures of the tiers new, trait and foreign: six training pictures, six held-out ones of other scenes, and
the run of configs/creatures.toml from each start at each learning rate, all with the same batches, sigmas and noise.
The starts are `random`, `i2l`, and, in the tier new, `wrong pictures`: the i2L seed of the next creature. Results go
to OUTPUT/report.json and OUTPUT/report.md. Runs that are done are not done again, so the command resumes.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from demo import painter
from trainer.files import new_folder, write_json, write_text

CONFIG = Path("configs/creatures.toml")
TIERS: tuple[painter.Tier, ...] = ("new", "trait", "foreign")
STARTS: dict[str, tuple[str, ...]] = {
    "new": ("random", "i2l", "wrong pictures"),
    "trait": ("random", "i2l"),
    "foreign": ("random", "i2l"),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
NUM_PICTURES = 6  # for training, and as many held out
FIRST_CREATURE = 100  # of a tier: not the one that the repository ships


@dataclass(frozen=True)
class Job:
    tier: painter.Tier
    index: int
    start: str
    learning_rate: float
    steps: int
    output: Path

    @property
    def folder(self) -> Path:
        name = f"{self.start.replace(' ', '-')}-{self.learning_rate:g}"
        return creature_folder(self.output, self.tier, self.index) / name


def creature_folder(output: Path, tier: str, index: int) -> Path:
    return output / tier / f"{index:03d}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.tiers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--creatures", type=int, default=10, help="of the tier new, and half as many of the others (default: 10)"
    )
    parser.add_argument("--steps", type=int, default=160, help="of each run (default: 160)")
    parser.add_argument("--output", type=Path, default=Path("outputs/tiers"))
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    options = parser.parse_args(arguments)
    counts = {"new": options.creatures, "trait": (options.creatures + 1) // 2, "foreign": (options.creatures + 1) // 2}
    creatures = [(tier, FIRST_CREATURE + i) for tier in TIERS for i in range(counts[tier])]
    jobs = [
        Job(tier, index, start, rate, options.steps, options.output)
        for tier, index in creatures
        for start in STARTS[tier]
        for rate in LEARNING_RATES
    ]
    began = time.monotonic()
    for tier, index in creatures:
        paint(options.output, tier, index)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=_one_thread) as pool:
        list(tqdm(pool.map(predict, [(options.output, *creature) for creature in creatures]), "seeds", len(creatures)))
        curves = list(tqdm(pool.map(run_job, jobs), "runs", len(jobs), unit="run"))
    results = [
        {"tier": j.tier, "creature": j.index, "start": j.start, "learning_rate": j.learning_rate, "curve": curve}
        for j, curve in zip(jobs, curves, strict=True)
    ]
    report = {
        "steps": options.steps,
        "seconds": time.monotonic() - began,
        "summary": summarise(results),
        "runs": results,
    }
    write_json(options.output / "report.json", report)
    write_text(options.output / "report.md", table(report["summary"], options.steps))
    print(table(report["summary"], options.steps))
    return 0


def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def paint(output: Path, tier: painter.Tier, index: int) -> None:
    """`pictures` and `held_out`: the scenes 0..11, which no training of the demo's models has used."""
    folder = creature_folder(output, tier, index)
    for name, first in (("pictures", 0), ("held_out", NUM_PICTURES)):
        if (folder / name).exists():
            continue
        with new_folder(folder / name) as partial:
            for number in range(first, first + NUM_PICTURES):
                where = painter.scene(number)
                Image.fromarray(painter.paint(painter.identity(tier, index), where)).save(partial / f"{number}.png")
                (partial / f"{number}.txt").write_text(painter.caption(where))


def predict(creature: tuple[Path, painter.Tier, int]) -> None:
    """The i2L seed of a creature as a LoRA file, for the runs of its neighbour that start from wrong pictures."""
    from initializers.i2l.__main__ import predict_file

    folder = creature_folder(*creature)
    if not (folder / "seed.safetensors").exists():
        predict_file(CONFIG, folder / "pictures", 8, folder / "seed.safetensors")


def run_job(job: Job) -> list[dict[str, float]]:
    """The run's validations: `step`, `val_loss`, `train_stable_loss`, `seconds`."""
    import initializers
    from trainer import run

    report_file = job.folder / "run.json"
    if report_file.exists() and (report := json.loads(report_file.read_text()))["status"] == "finished":
        return list(report["validations"])
    others = sorted(creature_folder(job.output, job.tier, job.index).parent.glob("*/seed.safetensors"))
    own = creature_folder(job.output, job.tier, job.index)
    neighbour = others[(others.index(own / "seed.safetensors") + 1) % len(others)]
    overrides: dict[str, Any] = {
        "output": job.folder,
        "data.images": own / "pictures",
        "data.held_out": own / "held_out",
        "data.cache": own / "cache",
        "init.method": {"wrong pictures": neighbour}.get(job.start, job.start),
        "train.learning_rate": job.learning_rate,
        "train.steps": job.steps,
        "validation.every": 10,
        "validation.prompts": "[]",
        "checkpoint.every": job.steps,
    }
    config, start = run.load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()], initializers)
    resume = report_file.exists()
    run.execute(run.prepare(config, start, resume=resume), resume=resume, quiet=True)
    return list(json.loads(report_file.read_text())["validations"])


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each creature and start, the best learning rate's curve: held-out loss at step 0, its best, and when."""
    rows = []
    for tier in TIERS:
        for creature in sorted({r["creature"] for r in results if r["tier"] == tier}):
            row: dict[str, Any] = {"tier": tier, "creature": creature}
            for start in STARTS[tier]:
                runs = [r for r in results if (r["tier"], r["creature"], r["start"]) == (tier, creature, start)]
                best, step, rate = min(
                    (point["val_loss"], point["step"], r["learning_rate"]) for r in runs for point in r["curve"]
                )
                at_zero = runs[0]["curve"][0]["val_loss"]
                row[start] = {"step_0": at_zero, "best": best, "best_step": step, "learning_rate": rate}
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """The summary as Markdown."""
    lines = [
        "Held-out stable loss; each start at its best of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in LEARNING_RATES)}, {steps} steps, seed 0.",
        "",
        "| tier, creature | base | random, best (step, rate) | i2L, step 0 | i2L, best (step, rate) | gain | "
        "wrong pictures, step 0 | wrong, best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        random, i2l, wrong = row["random"], row["i2l"], row.get("wrong pictures")
        lines.append(
            f"| {row['tier']} {row['creature']} | {random['step_0']:.3f} | {_best(random)} | {i2l['step_0']:.3f} "
            f"| {_best(i2l)} | {gain(row, 'i2l'):+.1%} "
            + (f"| {wrong['step_0']:.3f} | {wrong['best']:.3f} |" if wrong else "| | |")
        )
    lines.append("")
    lines += [_sentence(tier, [row for row in rows if row["tier"] == tier]) for tier in TIERS]
    return "\n".join(lines) + "\n"


def _sentence(tier: str, rows: Sequence[dict[str, Any]]) -> str:
    below = sum(row["i2l"]["step_0"] < row["random"]["best"] for row in rows)
    gains = [gain(row, "i2l") for row in rows]
    text = (
        f"- {tier}: i2L at step 0 is below random's best for {below} of {len(rows)} creatures; its own best is "
        f"{mean(gains):.1%} lower on average ({min(gains):+.1%} to {max(gains):+.1%})"
    )
    if "wrong pictures" in rows[0]:
        wrong = sum(row["wrong pictures"]["step_0"] < row["random"]["best"] for row in rows)
        lower = mean(gain(row, "wrong pictures") for row in rows)
        text += f"; with wrong pictures, step 0 is below for {wrong}, and the best is {lower:+.1%} lower on average"
    return text


def gain(row: dict[str, Any], start: str) -> float:
    """How much lower than random's best is this start's best, as a share."""
    return 1 - float(row[start]["best"]) / float(row["random"]["best"])


def _best(values: dict[str, float]) -> str:
    return f"{values['best']:.3f} ({values['best_step']}, {values['learning_rate']:g})"


if __name__ == "__main__":
    sys.exit(main())
