"""Measure what the negative branch of guidance may wear: python -m demo.guidance [--creatures 10]

i2L predicts a LoRA from the six pictures of each creature of the tier "new". It draws the captions of the six held-out
pictures, two noise seeds each, and prompts that have nothing to do with the creature. The negative branch has

    same   the LoRA of the pictures, as everywhere without asymmetric guidance
    base   no LoRA
    grey   the LoRA that i2L predicts from six grey pictures of the same size, as published for i2L v2

at several strengths of guidance. Measured, for each creature, then as the mean over all with its standard error:

    likeness   the mean cosine of samples with held-out pictures, by each image encoder
    diversity  the mean of 1 - cosine of samples of one prompt, by each image encoder
    drift      the mean squared distance of the latents drawn for the unrelated prompts from those of the base alone,
               with the same noise and guidance

The report is written to OUTPUT/report.json and OUTPUT/report.md.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import initializers
from demo import creatures, painter
from initializers.i2l.predict_file import predict
from trainer import measure, plan
from trainer.adapter import AdapterWeights
from trainer.cli import guarded
from trainer.data.pictures import grey_pictures, open_picture, pictures_in
from trainer.files import write_json, write_text
from trainer.studio import Settings, Studio, Worn

FIRST_CREATURE = 200  # index in the tier "new"
SCALES = (1.0, 2.0, 4.0)
NUM_SEEDS = 2
DEVICE = torch.device("cpu")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.guidance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--creatures", type=int, default=10, help="number of creatures (default: 10)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/guidance"), help="folder of the report (default: outputs/guidance)"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: measure_all(options.output, options.creatures))


def measure_all(output: Path, count: int) -> None:
    began, rows, world = time.monotonic(), list[Row](), _World(output)
    for index in tqdm(range(FIRST_CREATURE, FIRST_CREATURE + count), "creatures", unit="creature"):
        rows += world.measure(index)
    write_json(output / "report.json", {"seconds": time.monotonic() - began, "rows": rows})
    write_text(output / "report.md", table(rows))
    print(table(rows))


class _World:
    def __init__(self, output: Path):
        self._config, self._start = plan.load_config(creatures.CONFIG, ["init.method=i2l"], initializers)
        self._output = output
        self._studio = Studio(self._config.model, DEVICE, output / "cache", quiet=True)
        with TemporaryDirectory() as folder:
            sizes = [(painter.SIZE, painter.SIZE)] * creatures.NUM_PICTURES
            self._grey = self._predicted(grey_pictures(Path(folder), sizes))
        self._plain = {scale: self._unrelated(scale, None) for scale in SCALES}

    def _predicted(self, pictures: Sequence[Path]) -> Worn:
        weights, _ = predict(pictures, self._config.model.base, self._start.options, log=lambda _: None)
        return Worn("i2l", AdapterWeights(dict(weights.factors)))

    def measure(self, index: int) -> Iterator[Row]:
        folder = creatures.paint(self._output, "new", index)
        real = [open_picture(path) for path in pictures_in(folder / "held_out")]
        prompts = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in pictures_in(folder / "held_out")]
        own = self._predicted(pictures_in(folder))
        for scale in SCALES:
            for name, negative in (("same", None), ("base", []), ("grey", [self._grey])):
                if scale == 1 and name != "same":
                    continue
                with self._studio.wearing([own]):
                    samples = self._studio.pictures(self._latents(prompts, scale, negative))
                    drift = float((self._unrelated(scale, negative) - self._plain[scale]).square().mean())
                yield {"creature": index, "scale": scale, "negative": name, "drift": drift, **self._seen(samples, real)}

    def _seen(self, samples: Sequence[Image.Image], real: Sequence[Image.Image]) -> dict[str, float]:
        assert self._start.embed is not None
        embeddings = self._start.embed([*samples, *real], DEVICE)
        found = measure.likeness(embeddings, len(samples))
        for encoder, rows in embeddings.items():
            own = torch.nn.functional.normalize(rows[: len(samples)].double(), dim=1)
            found[f"diversity {encoder.lower()}"] = float(measure.diversities(own, NUM_SEEDS).mean())
        return found

    def _unrelated(self, scale: float, negative: Sequence[Worn] | None) -> Tensor:
        return self._latents(self._config.validation.unrelated_prompts, scale, negative)

    def _latents(self, prompts: Sequence[str], scale: float, negative: Sequence[Worn] | None) -> Tensor:
        """Those of a prompt together."""
        steps = self._config.validation.num_inference_steps
        settings = Settings(size=(painter.SIZE, painter.SIZE), num_inference_steps=steps, true_cfg_scale=scale)
        texts, seeds = [text for text in prompts for _ in range(NUM_SEEDS)], [*range(NUM_SEEDS)] * len(prompts)
        if negative is None:
            return self._studio.latents(texts, seeds, settings, batch_size=len(texts))
        with self._studio.with_negative(negative) as branch:
            return self._studio.latents(texts, seeds, settings, branch, batch_size=len(texts))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over creatures with their standard errors."""
    names = [name for name in rows[0] if name not in ("creature", "scale", "negative")]
    arms = dict.fromkeys((row["scale"], row["negative"]) for row in rows)
    lines = [f"| guidance | negative branch | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for scale, negative in arms:
        own = [row for row in rows if (row["scale"], row["negative"]) == (scale, negative)]
        cells = [_with_error([row[name] for row in own]) for name in names]
        lines.append(f"| {scale:g} | {'-' if scale == 1 else negative} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_error(values: Sequence[float]) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    sys.exit(main())
