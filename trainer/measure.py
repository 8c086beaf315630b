"""What a validation measures besides samples: the stable errors of each picture, and what is done to the rest of the
model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer import flow, qwen_image, validation
from trainer.hardware import parallel
from trainer.tracking import Tracker
from trainer.validation import NUM_SIGMAS, Item

Record = dict[str, Any]
"""A line of pictures.jsonl: `part`, `picture`, `what` and `errors`, one for each sigma of the stable loss."""


class Passes:
    """Forward passes of the transformer, divided among the processes."""

    def __init__(self, transformer: torch.nn.Module, accelerator: Accelerator, dtype: torch.dtype, batch_size: int):
        self.transformer, self.accelerator = transformer, accelerator
        self.dtype, self.batch_size = dtype, batch_size

    def share(
        self, count: int, compute: Callable[[int], Tensor], what: str = "", tracker: Tracker | None = None
    ) -> Tensor:
        """`compute(row)` for each of so many rows, each by one process: N ... on every process."""
        rows = parallel.rows_of_process(self.accelerator, count)
        found = [compute(row) for row in (tracker.each(rows, what) if tracker else rows)]
        return parallel.collect_rows(self.accelerator, count, rows, torch.stack(found))

    def errors(self, items: Sequence[Item], what: str = "", tracker: Tracker | None = None) -> Tensor:
        """N 8 W: the stable errors of each picture at each sigma, in each of its W ways to weigh them."""
        device = self.accelerator.device

        def compute(row: int) -> Tensor:
            return validation.weighted_errors(
                self.transformer, [items[row]], device, self.dtype, batch_size=self.batch_size
            )[0]

        return self.share(len(items), compute, what, tracker)


def records(items: Sequence[Item], errors: Tensor, part: str, what: str) -> Iterable[Record]:
    """errors: N 8"""
    for item, row in zip(items, errors.tolist(), strict=True):
        yield {"part": part, "picture": item.name, "what": what, "errors": row}


class Drift:
    """How far the velocity for unrelated prompts has moved from the frozen base's, without drawing anything.

    For each prompt, the base's first step from pure noise z gives the picture that it expects, x = z - v(z, 1). At x
    with other noise, at the sigmas of the stable loss, the drift is |v - v_base|^2 / |v_base|^2, over all prompts
    together: 0 is no change. The noise is always the same.
    """

    def __init__(
        self,
        passes: Passes,
        prompts: Sequence[Tensor],
        shape: Sequence[int],
        base: Callable[[], AbstractContextManager[None]],
    ):
        """prompts: prompt_embeds, L D each. shape: of the latents, C 1 h w. base: inside, the transformer is the frozen
        base."""
        self._passes, self._prompts, self._shape, self._base = passes, prompts, tuple(shape), base

    def __call__(self, tracker: Tracker | None = None) -> float:
        inputs, plain = self._plain
        moved = self._velocities(inputs, tracker)
        return float((moved - plain).square().sum() / plain.square().sum())

    @cached_property
    def _plain(self) -> tuple[Tensor, Tensor]:
        """Noised pictures, N 8 C 1 h w, and the base's velocities there."""
        sigmas = flow.stratified_sigmas(NUM_SIGMAS)
        with self._base():
            inputs = self._passes.share(len(self._prompts), lambda row: self._noised(row, sigmas)).cpu()
            return inputs, self._velocities(inputs, None)

    def _noised(self, row: int, sigmas: Tensor) -> Tensor:
        random = flow.generator("drift", row)
        noise = torch.randn(1, *self._shape, generator=random)
        expected = noise - self._predict(noise, torch.ones(1), row).cpu()
        other = torch.randn(NUM_SIGMAS, *self._shape, generator=random)
        return flow.interpolate(expected.expand_as(other), other, sigmas)

    def _velocities(self, inputs: Tensor, tracker: Tracker | None) -> Tensor:
        sigmas, size = flow.stratified_sigmas(NUM_SIGMAS), self._passes.batch_size

        def compute(row: int) -> Tensor:
            parts = zip(inputs[row].split(size), sigmas.split(size), strict=True)
            return torch.cat([self._predict(noisy, some, row) for noisy, some in parts])

        return self._passes.share(len(inputs), compute, "drift", tracker).cpu()

    @torch.no_grad()
    def _predict(self, noisy: Tensor, sigmas: Tensor, row: int) -> Tensor:
        device = self._passes.accelerator.device
        prompt = self._prompts[row].to(device).expand(len(noisy), -1, -1)
        predicted = qwen_image.predict_velocity(
            self._passes.transformer, noisy.to(device, self._passes.dtype), sigmas.to(device), prompt, None
        )
        return predicted.float()


def likeness(embeddings: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
    """`likeness <encoder>`: the mean cosine of all samples with all real pictures. embeddings: encoder -> N D, the
    samples first."""
    found = {}
    for encoder, rows in embeddings.items():
        rows = torch.nn.functional.normalize(rows.double(), dim=1)
        found[f"likeness {encoder.lower()}"] = float((rows[:num_samples] @ rows[num_samples:].T).mean())
    return found


def diversities(rows: Tensor, num_samples: int) -> Tensor:
    """How much samples of one prompt differ: the mean of 1 - cosine of each two of them, for each prompt.

    rows: (prompts num_samples) D, of length 1, those of a prompt together.
    """
    groups = rows.unflatten(0, (-1, num_samples))  # P N D
    cosines = groups @ groups.transpose(1, 2)
    pairs = torch.triu_indices(num_samples, num_samples, 1)
    return (1 - cosines[:, pairs[0], pairs[1]]).mean(1)
