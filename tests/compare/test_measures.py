"""Samples measured by image encoders, against plain loops over all pairs of pictures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import initializers
from trainer import validation
from trainer.compare import measures
from trainer.compare.plan import Comparison, Request, prepare
from trainer.data.dataset import load_picture
from trainer.files import write_json

CPU = torch.device("cpu")
PROMPTS = ("one", "two")


class Encoders:
    """Two image encoders: the first sees colours, the second in which quarters it is bright. Neither is normalised."""

    def embed(self, method: str, options: Any, pictures: Sequence[Image.Image], device: Any) -> dict[str, Tensor]:
        pixels = [torch.from_numpy(np.array(picture.convert("RGB"))).float() for picture in pictures]
        quarters = [p.mean(-1).unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3)).flatten() for p in pixels]
        return {"colours": torch.stack([p.mean((0, 1)) for p in pixels]), "quarters": torch.stack(quarters)}

    def identity(self, method: str, options: Any) -> list[str]:
        return []


@pytest.fixture
def comparison(run_toml: Path) -> Comparison:
    """Two arms and two seeds, with samples of the first seed at two steps."""
    request = Request(initializers=("random", "gaussian"), seeds=2, learning_rates=(1e-3,))
    overrides = [f"output={run_toml.parent / 'out'}", f"validation.prompts={[*PROMPTS]}"]
    found = prepare(run_toml, overrides, request, initializers)
    found = replace(found, initializers=Encoders(), image_encoders=found.arms[0].start)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    for cell in found.cells():
        write_json(cell.result_file, {"status": "finished"})
        for step in (0, 10):
            for row in range(len(PROMPTS)):
                for number in range(measures.NUM_SAMPLES):
                    pixels = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                    picture = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
                    name = f"step-{step:06d}-{row}-{number}.png"
                    validation.write_png(cell.folder / "samples" / name, picture)
    return found


def cosine(x: Tensor, y: Tensor) -> float:
    return float((x.double() * y.double()).sum() / x.double().norm() / y.double().norm())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("encoder", ["colours", "quarters"])
def test_similarity_and_diversity_are_means_over_pairs(encoder: str, comparison: Comparison) -> None:
    (subject,) = comparison.subjects
    measures.measure_samples(comparison, [subject], CPU, quiet=True)
    found = measures.read_pictures(comparison, subject)
    assert found is not None

    def embedded(pictures: Sequence[Image.Image]) -> list[Tensor]:
        return [*Encoders().embed("", None, pictures, CPU)[encoder]]

    held_out, shown = (
        embedded([load_picture(example) for example in part])
        for part in (subject.plan.dataset.held_out, subject.plan.dataset.train)
    )
    assert found["training"][f"similarity {encoder}"] == pytest.approx(
        mean([cosine(x, y) for x in shown for y in held_out])
    )
    cells = [cell for cell in comparison.cells() if cell.seed == 0]
    assert found["runs"].keys() == {f"{cell.arm.name}/{cell.folder.name}" for cell in cells} and len(cells) == 2
    for cell in cells:
        for step in (0, 10):
            drawn = [
                embedded([Image.open(cell.folder / "samples" / f"step-{step:06d}-{row}-{n}.png") for n in (0, 1)])
                for row in (0, 1)
            ]
            values = found["runs"][f"{cell.arm.name}/{cell.folder.name}"][str(step)]
            similar = [cosine(x, y) for group in drawn for x in group for y in held_out]
            different = [1 - cosine(x, y) for group in drawn for x, y in combinations(group, 2)]
            assert values[f"similarity {encoder}"] == pytest.approx(mean(similar))
            assert values[f"diversity {encoder}"] == pytest.approx(mean(different), abs=1e-9)


def test_measures_are_of_the_runs_that_are_there(comparison: Comparison) -> None:
    """Of other settings they are measured anew."""
    (subject,) = comparison.subjects
    measures.measure_samples(comparison, [subject], CPU, quiet=True)
    other = replace(comparison, config=replace(comparison.config, seed=3))
    assert measures.read_pictures(comparison, subject) is not None and measures.read_pictures(other, subject) is None
