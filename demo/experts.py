"""Measure each set of i2L experts at step 0, before any training: python -m demo.experts [--creatures 20]

Each creature of the tier "new" has six reference pictures, and six held-out pictures of other scenes. For each set of
experts the report has

    loss   the held-out stable loss, over three draws of its noise: with the seed of the creature's own pictures
           (right) and with the seed of the next creature's (wrong)
    drift  on prompts that have nothing to do with the creature: the mean squared distance of the samples' latents from
           those of the base with equal noise

and the same for strength = "auto". It is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import initializers
from demo import creatures, painter
from initializers.i2l import initializer as i2l
from trainer import adapter, plan, qwen_image, run, validation
from trainer.adapter import AdapterWeights, InitContext
from trainer.cli import guarded
from trainer.files import write_json, write_text
from trainer.lowrank import truncate

SETS: dict[str, tuple[str, ...]] = {
    "Style": ("style",),
    "Coarse": ("coarse",),
    "Coarse + Fine": ("coarse", "fine"),
    "Coarse + Fine + Bias": ("coarse", "fine", "bias"),
}
NOISE_SEEDS = (0, 1, 2)
FIRST_CREATURE = 200  # index in the tier "new"
DEVICE = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=20, help="number of creatures (default: 20)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/experts"), help="folder of the report (default: outputs/experts)"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.output, options.creatures))


def measure_all(output: Path, count: int) -> None:
    began, rows, strengths = time.monotonic(), [], []
    world = _World()
    for index in tqdm(range(FIRST_CREATURE, FIRST_CREATURE + count), "creatures", unit="creature"):
        other = FIRST_CREATURE + (index + 1 - FIRST_CREATURE) % count
        creature = world.creature(output, index)
        rows += world.measure(creature, output, other)
        strengths += world.choose(creature, output, other)
    summary = summarise(rows)
    report = {"seconds": time.monotonic() - began, "summary": summary, "rows": rows, "strengths": strengths}
    write_json(output / "report.json", report)
    text = table(summary, count, creature.context.rank) + "\n" + strength_table(rows, strengths)
    write_text(output / "report.md", text)
    print(text)


@dataclass(frozen=True)
class _Creature:
    index: int
    held_out: list[validation.Item]
    context: InitContext


class _World:
    """The demo's base, on which seeds are measured one after another."""

    def __init__(self) -> None:
        self._config, start = plan.load_config(creatures.CONFIG, ["init.method=i2l"], initializers)
        self._options: i2l.Config = start.options
        base = self._config.model.base
        self._transformer = qwen_image.load_transformer(self._config.model, DEVICE)
        self._sampler = qwen_image.Sampler(base)
        self._text_encoder = qwen_image.TextEncoder(base, DEVICE)
        encode = qwen_image.PromptEncoder(self._text_encoder, torch.float32)
        self._prompts = encode(self._config.validation.unrelated_prompts)
        self._plain = self._samples()

    def creature(self, output: Path, index: int) -> _Creature:
        folder = creatures.paint(output, "new", index)
        overrides = [f"output={output / 'plan'}", f"data.images={folder}", "data.trigger="]
        overrides += [f"data.held_out={folder / 'held_out'}", f"data.cache={output / 'cache'}"]
        settings, start = plan.load_config(creatures.CONFIG, overrides, initializers)
        prepared = plan.prepare(settings, start, resume=False)
        encoded = run.encode(prepared, DEVICE, self._text_encoder, quiet=True)
        items = [encoded.item(example) for example in prepared.dataset.held_out]
        trials = run.Trials(prepared, encoded, self._text_encoder, lambda: self._transformer)
        return _Creature(index, items, run.init_context(prepared, DEVICE, trials, self._text_encoder))

    def measure(self, creature: _Creature, output: Path, other: int) -> list[dict[str, Any]]:
        """A row for each set of experts, with the creature's own pictures and with those of `other`."""
        rows: list[dict[str, Any]] = [self._row(creature, "none", "none", AdapterWeights({}))]
        for name, experts in SETS.items():
            for pictures, shown in (("right", creature.index), ("wrong", other)):
                weights, _ = self._seed(creature, output, shown, i2l.Config(experts=experts))
                rows.append(self._row(creature, name, pictures, weights))
        return rows

    def choose(self, creature: _Creature, output: Path, other: int) -> list[dict[str, Any]]:
        """The same rows for strength = "auto" with the configuration's experts, and the strength that it chooses."""
        rows = []
        for pictures, shown in (("right", creature.index), ("wrong", other)):
            options = i2l.Config(experts=self._options.experts, strength="auto")
            weights, report = self._seed(creature, output, shown, options)
            row = self._row(creature, "auto", pictures, weights)
            rows.append({**row, "strength": report["strength"], "tried": report["tried"]})
        return rows

    def _row(self, creature: _Creature, name: str, pictures: str, weights: AdapterWeights) -> dict[str, Any]:
        handles = adapter.attach_frozen(self._transformer, weights) if weights.factors else []
        drift = float((self._samples() - self._plain).square().mean())
        loss = self._losses(creature.held_out)
        for handle in handles:
            handle.remove()
        return {"creature": creature.index, "set": name, "pictures": pictures, "loss": loss, "drift": drift}

    def _seed(
        self, creature: _Creature, output: Path, index: int, options: i2l.Config
    ) -> tuple[AdapterWeights, dict[str, Any]]:
        """The seed of the pictures of creature `index`, and its report. "auto" compares strengths on the pictures of
        `creature`."""
        folder = creatures.paint(output, "new", index)
        images = tuple(sorted(folder.glob("*.png")))
        context = replace(creature.context, images=images, log=lambda message: None)
        options = replace(options, weights=self._options.weights, encoders=self._options.encoders)
        seed = i2l.initialize(context, options)
        factors = {name: truncate(x, context.rank)[0] for name, x in seed.weights.factors.items()}
        return AdapterWeights(factors), seed.report

    def _losses(self, items: Sequence[validation.Item]) -> list[float]:
        return [
            float(validation.stable_errors(self._transformer, items, DEVICE, torch.float32, seed=seed).mean())
            for seed in NOISE_SEEDS
        ]

    def _samples(self) -> Tensor:
        size = (painter.SIZE, painter.SIZE)
        count = len(self._prompts)
        return self._sampler.latents(
            self._transformer, self._prompts, size=size, seeds=range(count), num_inference_steps=12, batch_size=count
        )


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each set of experts and kind of pictures: the mean loss over creatures and noise, its standard deviation over
    noise seeds, the number of creatures whose loss is below the base's, and the drift."""
    base = {row["creature"]: mean(row["loss"]) for row in rows if row["set"] == "none"}
    found = []
    for name, pictures in dict.fromkeys((row["set"], row["pictures"]) for row in rows):
        own = [row for row in rows if (row["set"], row["pictures"]) == (name, pictures)]
        by_seed = [mean(losses) for losses in zip(*(row["loss"] for row in own), strict=True)]
        found.append(
            {
                "set": name,
                "pictures": pictures,
                "loss": mean(by_seed),
                "spread": stdev(by_seed),
                "below_base": sum(mean(row["loss"]) < base[row["creature"]] for row in own),
                "drift": mean(row["drift"] for row in own),
            }
        )
    return found


def table(summary: Sequence[Mapping[str, Any]], creatures: int, rank: int) -> str:
    """The summary as Markdown."""
    lines = [
        f"Held-out stable loss at step 0: the mean over {creatures} creatures of the tier new, with seeds of rank "
        f"{rank} (in brackets the standard deviation over {len(NOISE_SEEDS)} noise seeds).",
        "",
        "| experts | right pictures | below the base | wrong pictures | below the base | drift |",
        "|---|---|---|---|---|---|",
    ]
    cells = {(row["set"], row["pictures"]): row for row in summary}
    none = cells["none", "none"]
    lines.append(f"| none | {none['loss']:.4f} ({none['spread']:.4f}) | | | | 0 |")
    for name in SETS:
        right, wrong = cells[name, "right"], cells[name, "wrong"]
        lines.append(
            f"| {name} | {right['loss']:.4f} ({right['spread']:.4f}) | {right['below_base']} of {creatures} "
            f"| {wrong['loss']:.4f} ({wrong['spread']:.4f}) | {wrong['below_base']} of {creatures} "
            f"| {right['drift']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def strength_table(rows: Sequence[Mapping[str, Any]], strengths: Sequence[Mapping[str, Any]]) -> str:
    """The strengths that strength = "auto" chooses, as Markdown."""
    base = {row["creature"]: mean(row["loss"]) for row in rows if row["set"] == "none"}
    lines = [
        'strength = "auto", with the experts of configs/creatures.toml:',
        "",
        "| pictures | strengths taken (creatures) | loss | at or below the base |",
        "|---|---|---|---|",
    ]
    for pictures in ("right", "wrong"):
        own = {row["creature"]: row for row in strengths if row["pictures"] == pictures}
        taken = Counter(row["strength"] for row in own.values())
        losses = {index: mean(row["loss"]) for index, row in own.items()}
        good = sum(loss <= base[index] for index, loss in losses.items())
        counted = ", ".join(f"{strength:g} ({count})" for strength, count in sorted(taken.items()))
        lines.append(f"| {pictures} | {counted} | {mean(losses.values()):.4f} | {good} of {len(own)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
