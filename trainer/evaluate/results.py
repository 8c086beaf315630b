"""What was seen of LoRAs, as numbers: a row for each measure, a value for each LoRA."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.evaluate import metrics
from trainer.evaluate.folder import Seen
from trainer.evaluate.metrics import Value
from trainer.measure import diversities


@dataclass(frozen=True)
class Measure:
    """A measure, and what it says of each LoRA."""

    name: str
    better: str
    """"lower", "higher", or "" where neither is better by itself."""
    told: str
    values: Mapping[str, Value]
    """By the LoRA's name; the base among them."""
    against_base: Mapping[str, Value]
    """The difference from the base, picture by picture, where that is surer than the difference of means."""
    real: Value | None = None
    """What training pictures get in the place of samples."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings by an encoder, N D each of length 1."""

    encoder: str
    held_out: Tensor
    train: Tensor
    samples: Mapping[str, Tensor]
    """By the LoRA's name, those of a prompt together."""


def losses(seen: Sequence[Seen]) -> Measure:
    told = "The stable loss of held-out pictures: always with the same sigmas and noise."
    return _paired("val_loss", "lower", told, {one.candidate.name: one.errors.double().mean(1) for one in seen})


def redrawn(seen: Sequence[Seen], originals: Sequence[Path]) -> list[Measure]:
    """PSNR and SSIM at each sigma, against the pictures as the VAE gives them back."""
    found = []
    for sigma in seen[0].redrawn:
        for name, compute, what in (("psnr", metrics.psnr, "PSNR in dB"), ("ssim", metrics.ssim, "SSIM")):
            told = f"{what} of held-out pictures, redrawn from noise of sigma {sigma:g} with their captions."
            rows = {
                one.candidate.name: torch.cat(
                    [compute(_pixels(a), _pixels(b)) for a, b in zip(one.redrawn[sigma], originals, strict=True)]
                )
                for one in seen
            }
            found.append(_paired(f"{name} {sigma:g}", "higher", told, rows))
    return sorted(found, key=lambda measure: measure.name.split()[0])


def drift(seen: Sequence[Seen], num_prompts: int) -> list[Measure]:
    """None of it without unrelated prompts."""
    told = "How far the velocity for unrelated prompts has moved from the base's: |v - v_base|^2 / |v_base|^2."
    values = {one.candidate.name: Value(one.drift, None, num_prompts) for one in seen if one.drift is not None}
    return [Measure("drift", "lower", told, values, {})] if values else []


def fidelity(cosines: Mapping[str, Tensor]) -> Measure:
    """cosines: by the LoRA's name, of each sample with its prompt."""
    told = "How well samples fit their prompts: the mean cosine by a SigLIP that reads text."
    return _paired("fidelity", "higher", told, cosines)


def embedded(space: Embedded, num_seeds: int) -> list[Measure]:
    """Likeness, diversity and the distances in one encoder's space."""
    encoder, held_out = space.encoder.lower(), space.held_out
    dim, drawn = held_out.shape[1], space.samples
    told = f"The mean cosine of samples with held-out pictures by {space.encoder}. It rises where they copy, too."
    found = [
        Measure(
            f"likeness {encoder}",
            "higher",
            told,
            {name: _likeness(rows, held_out) for name, rows in drawn.items()},
            {},
            _likeness(space.train, held_out),
        )
    ]
    if num_seeds > 1:
        told = f"How much samples of one prompt differ by {space.encoder}: the mean of 1 - cosine of each two. "
        told += "Little of it beside much likeness may be copying; the base draws another subject each time."
        values = {name: metrics.mean(diversities(rows, num_seeds)) for name, rows in drawn.items()}
        found.append(Measure(f"diversity {encoder}", "", told, values, {}))
    count = min(len(rows) for rows in drawn.values())
    real = space.train[:count]
    if min(count, len(held_out)) < 2:
        return found
    frechet = {name: Value(metrics.frechet(rows, held_out), None, len(rows)) for name, rows in drawn.items()}
    of_real = Value(metrics.frechet(real, held_out), None, len(real)) if len(real) > 1 else None
    told = f"The squared Fréchet distance of samples from held-out pictures, {dim} numbers each, by {space.encoder}."
    found.append(Measure(f"frechet {encoder}", "lower", told, frechet, {}, of_real))
    long = math.sqrt(dim)  # so that the kernel is (1 + cosine)^3
    kernel = {name: metrics.kernel_distance(long * rows, long * held_out) for name, rows in drawn.items()}
    of_real = metrics.kernel_distance(long * real, long * held_out) if len(real) > 1 else None
    told = f"The unbiased kernel distance of samples from held-out pictures by {space.encoder}, by (1 + cosine)^3."
    found.append(Measure(f"kernel {encoder}", "lower", told, kernel, {}, of_real))
    return found


def notes(space: Embedded) -> list[str]:
    """What the numbers of an encoder's space are worth at these counts."""
    count, (held_out, dim) = min(len(rows) for rows in space.samples.values()), space.held_out.shape
    real = min(len(space.train), count)
    if min(count, held_out) < 2:
        return [f"{space.encoder}: Fréchet and kernel distance need two samples and two held-out pictures."]
    found = []
    if min(count, held_out) <= dim:
        found.append(
            f"frechet {space.encoder.lower()}: {count} samples and {held_out} held-out pictures are too few for "
            f"covariances of {dim} numbers: they are singular, and the distance is biased upwards, far above 0 even "
            f"for pictures that are alike. Only compare it within its row, and with what {real} training pictures get."
        )
    if real < count:
        found.append(
            f"frechet {space.encoder.lower()}: there are {real} training pictures to {count} samples. Fewer are biased "
            "more, so that a LoRA may come out below them."
        )
    return found


def best(measure: Measure) -> set[str]:
    """The names of the LoRAs with the best value; empty where neither is better, or all are the same. The base, the
    first, is none of them: it would be the best in drift."""
    values = {name: value.value for name, value in [*measure.values.items()][1:]}
    if not measure.better or len({*values.values()}) < 2:
        return set()
    wanted = (min if measure.better == "lower" else max)(values.values())
    return {name for name, value in values.items() if value == wanted}


def _likeness(rows: Tensor, held_out: Tensor) -> Value:
    """Its standard error is over the rows: held-out pictures are taken as they are."""
    return metrics.mean((rows @ held_out.T).mean(1))


def _paired(name: str, better: str, told: str, rows: Mapping[str, Tensor]) -> Measure:
    """rows: by the LoRA's name, the base first, a value for each picture or sample."""
    base, *others = rows
    against = {other: metrics.mean(rows[other].double() - rows[base].double()) for other in others}
    return Measure(name, better, told, {other: metrics.mean(own) for other, own in rows.items()}, against)


def _pixels(path: Path) -> Tensor:
    """1 3 H W in [0, 1]"""
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1)[None]
