"""Measure what masks do to a LoRA: python -m demo.masks [--creatures 4] [--seeds 1]

Creatures that no model of the demo has seen are painted with exact masks. Of each there are six pictures for training,
in two ways: all in one room that no caption names, or before the five backgrounds, which captions name; and six
held-out pictures before the other backgrounds. LoRAs are trained on each from equal starts, with equal batches and
noise, and differ only in mask_outside: 1 is training without masks. The report has of each, after training

    inside   the held-out stable loss on the creature
    outside  the same on what is around it
    drift    on prompts that have nothing to do with the creature: the mean squared distance of the samples' latents
             from those of the base with equal noise

and is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import initializers
from demo import creatures, painter
from demo.painter import Scene
from demo.workbench import Workbench
from trainer import objective, plan, qwen_image, validation
from trainer.cli import guarded
from trainer.data import masks
from trainer.data.dataset import Example
from trainer.files import new_folder, write_json, write_text
from trainer.tracking import Tracker

OUTSIDE = (1.0, 0.1, 0.01, 0.0)
FIRST_CREATURE = 300  # index in the tier "new"
STEPS = 100
SETTINGS = (
    f"train.steps={STEPS}", "train.learning_rate=1e-3", f"validation.every={STEPS}", "validation.prompts=[]",
    "validation.num_pictures=1", f"checkpoint.every={STEPS}", "init.method=random", "data.trigger=zorp",
)  # fmt: skip
MEASURES = ("inside", "outside", "drift")
ROOM, NAMED = "one room, not in the captions", "five backgrounds, in the captions"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=4, help="number of creatures (default: 4)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of each run (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/masks"), help="folder of the report (default: outputs/masks)"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.output, options.creatures, options.seeds))


def measure_all(output: Path, count: int, seeds: int) -> None:
    began, masked, rows = time.monotonic(), _Masks(output), list[dict[str, Any]]()
    indices = range(FIRST_CREATURE, FIRST_CREATURE + count)
    cells = [*product((ROOM, NAMED), indices, range(seeds), OUTSIDE)]
    for pictures, index, seed, outside in tqdm(cells, "runs", unit="run"):
        folder = paint(output / "pictures", pictures, index)
        rows.append({**masked.train(folder, seed, outside), "pictures": pictures, "creature": index})
    write_json(output / "report.json", {"seconds": time.monotonic() - began, "rows": rows})
    write_text(output / "report.md", text := table(rows))
    print(text)


def paint(root: Path, pictures: str, index: int) -> Path:
    """The creature's folder, painted if it does not exist yet: six pictures with masks and captions, six held out."""
    path = root / pictures.replace(",", "").replace(" ", "_") / str(index)
    if path.exists():
        return path
    room, *others = "room", *(name for name in painter.BACKGROUNDS if name != "room")
    with new_folder(path) as partial:
        (partial / "held_out").mkdir()
        for number, (place, size) in enumerate(product(painter.PLACES, painter.SIZES)):
            shown = room if pictures == ROOM else [room, *others][number % 5]
            where = Scene(background=shown, place=place, size=size, seed=number)
            text = painter.caption(where)
            _save(partial, index, where, text.rpartition(", ")[0] if pictures == ROOM else text)
            held_out = Scene(background=others[number % 4], place=place, size=size, seed=100 + number)
            _save(partial / "held_out", index, held_out, painter.caption(held_out))
    return path


def _save(folder: Path, index: int, where: Scene, caption: str) -> None:
    name, who = f"{where.background}-{where.place}-{where.size}", painter.identity("new", index)
    Image.fromarray(painter.paint(who, where)).save(folder / f"{name}.png")
    Image.fromarray(painter.mask(who, where)).save(folder / f"{name}.mask.png")
    write_text(folder / f"{name}.txt", caption)


class _Masks:
    """What runs of differently weighed masks share: the base's own samples."""

    def __init__(self, output: Path):
        self._bench = Workbench(output)
        config, _ = plan.load_config(creatures.CONFIG, [], initializers)
        self._sampler = qwen_image.Sampler(config.model.base)
        encode = qwen_image.PromptEncoder(self._bench.text_encoder, torch.float32)
        self._prompts = encode(config.validation.unrelated_prompts)
        self._plain = self._samples()

    def train(self, pictures: Path, seed: int, outside: float) -> dict[str, Any]:
        """What a run has come to, step by step."""
        bench, name = self._bench, f"{pictures.parent.name}-{pictures.name}-{seed}-{outside:g}"
        given = (f"data.held_out={pictures / 'held_out'}", f"data.mask_outside={outside}", f"seed={seed}")
        prepared = bench.plan(name, pictures, *given, *SETTINGS)
        encoded = bench.encode(prepared)
        items = [_halves(encoded, example) for example in prepared.dataset.held_out]

        def measure(step: int, tracker: Tracker) -> Mapping[str, float]:
            errors = validation.weighted_errors(bench.transformer, items, bench.device, torch.float32)
            _, inside, around = errors.mean(dim=(0, 1)).tolist()
            drift = {"drift": float((self._samples() - self._plain).square().mean())} if step in (0, STEPS) else {}
            return {"inside": inside, "outside": around, **drift}

        result, _ = bench.train(prepared, encoded, bench.seed(prepared, encoded), measure)
        return {"seed": seed, "mask_outside": outside, "curve": result.validations}

    def _samples(self) -> Tensor:
        """Latents of the unrelated prompts."""
        return self._sampler.latents(
            self._bench.transformer.eval(),
            self._prompts,
            size=(painter.SIZE, painter.SIZE),
            seeds=range(len(self._prompts)),
            num_inference_steps=10,
            batch_size=len(self._prompts),
        )


def _halves(encoded: objective.Encoded, example: Example) -> validation.Item:
    """With weights for the creature alone, and for what is around it alone."""
    assert example.mask is not None
    item, mask = encoded.item(example), masks.load(example.mask, example.bucket)
    cells = (item.latents.shape[-2], item.latents.shape[-1])
    return replace(item, weights=tuple(masks.weights(m, cells, 0.0) for m in (mask, ImageOps.invert(mask))))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each way of training, as Markdown: means over creatures and seeds, and how often less than without
    masks."""
    lines = ["| pictures for training | mask_outside | inside | outside | drift |", "|---|---|---|---|---|"]
    for pictures in (ROOM, NAMED):
        own = [row for row in rows if row["pictures"] == pictures]
        plain = [row for row in own if row["mask_outside"] == 1]
        lines.append(_line(pictures, "before training", [_cell(plain, plain, what, 0) for what in MEASURES]))
        for outside in OUTSIDE:
            found = [row for row in own if row["mask_outside"] == outside] if outside < 1 else plain
            cells = [_cell(found, plain, what, -1) for what in MEASURES]
            lines.append(_line(pictures, "1, no masks" if outside == 1 else f"{outside:g}", cells))
    return "\n".join(lines) + "\n"


def _line(pictures: str, name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([pictures, name, *cells])} |"


def _cell(rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], what: str, point: int) -> str:
    values, others = ([row["curve"][point][what] for row in some] for some in (rows, plain))
    lower = sum(value < other for value, other in zip(values, others, strict=True))
    return f"{mean(values):.3f}" + (f" (lower in {lower} of {len(values)})" if rows is not plain else "")


if __name__ == "__main__":
    logging.getLogger("trainer").setLevel(logging.WARNING)  # each run would say how it starts
    sys.exit(main())
