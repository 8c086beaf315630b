"""What is computed with each LoRA on the base: errors, drift, redrawn pictures, samples."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from trainer import adapter, flow, measure, qwen_image
from trainer.data.cache import Cache
from trainer.data.encode import encode_pictures
from trainer.errors import UserError
from trainer.evaluate.folder import Seen
from trainer.evaluate.plan import Candidate, Evaluation
from trainer.files import DTYPES, write_json
from trainer.studio import Settings, Studio, read_worn
from trainer.validation import Item, Sample, write_png, write_sample


class Examiner:
    """The base, held-out pictures encoded, and all that is the same for each LoRA."""

    def __init__(self, evaluation: Evaluation, accelerator: Accelerator, *, quiet: bool):
        self._evaluation, self._accelerator, self._quiet = evaluation, accelerator, quiet
        run, device = evaluation.config, accelerator.device
        self._dtype, self._batch = DTYPES[run.model.dtype], 2 * run.train.batch_size  # no gradients: there is more room
        self._studio = Studio(run.model, device, evaluation.config.cache, quiet=quiet)
        examples = evaluation.looked_at
        latents = encode_pictures(Cache(evaluation.config.cache), run.model.base, examples, device, quiet=quiet)
        texts = {*evaluation.prompts, *run.validation.unrelated_prompts, qwen_image.EMPTY_PROMPT}
        prompts = self._studio.encode(texts | {example.caption for example in examples})
        self.items = [
            Item(example.name, example.digest, own, prompts[example.caption])
            for example, own in zip(examples, latents, strict=True)
        ]

    @cached_property
    def _passes(self) -> measure.Passes:
        return measure.Passes(self._studio.transformer, self._accelerator, self._dtype, self._batch)

    @cached_property
    def _drift(self) -> measure.Drift | None:
        texts, transformer = self._evaluation.config.validation.unrelated_prompts, self._studio.transformer
        if not texts:
            return None
        prompts, shape = [self._studio.prompts[text] for text in texts], self.items[0].latents.shape
        return measure.Drift(self._passes, prompts, shape, lambda: adapter.switched_off(transformer))

    def write_originals(self, paths: Sequence[Path]) -> None:
        """The held-out pictures as the VAE gives them back, each into its file, unless it is there."""
        for item, path in zip(self.items, paths, strict=True):
            if not path.is_file():
                write_png(path, self._studio.pictures(item.latents[None])[0])

    def look(self, seen: Sequence[Seen]) -> None:
        """All that is seen of each LoRA into its files, unless it is there, with a bar. The base is only loaded if
        something is missing."""
        for one in tqdm(seen, "evaluate", unit="LoRA", disable=self._quiet or None, dynamic_ncols=True):
            if one.whole:
                continue
            candidate = one.candidate
            worn = [] if candidate.asked is None else [read_worn(candidate.asked)]
            with self._studio.wearing(worn):
                if not one.numbers.is_file():
                    write_json(one.numbers, self._numbers(candidate))
                self._write_redrawn(one)
                self._write_samples(one)

    def _numbers(self, candidate: Candidate) -> dict[str, Any]:
        """UserError if it gives no finite numbers."""
        errors = self._passes.errors(self.items)[..., 0].cpu()
        if not bool(errors.isfinite().all()):
            raise UserError(
                f"{candidate.name}: its stable losses are NaN or infinite. Give it a lower strength, as "
                f"FILE:0.5, and another --output; in fp16, {qwen_image.NAN_ADVICE}"
            )
        return {"errors": errors.tolist(), "drift": self._drift() if self._drift else None}

    def _write_redrawn(self, one: Seen) -> None:
        for sigma, paths in one.redrawn.items():
            for item, path in zip(self.items, paths, strict=True):
                if not path.is_file():
                    write_png(path, self._studio.pictures(self._redraw(item, sigma))[0])

    def _write_samples(self, one: Seen) -> None:
        """In batches that are always the same: in another one, a sample may differ in its last bits."""
        evaluation = self._evaluation
        run, batch = evaluation.config.validation, evaluation.config.train.batch_size
        settings = Settings(
            size=evaluation.dataset.train[0].bucket,
            num_inference_steps=run.num_inference_steps,
            true_cfg_scale=run.true_cfg_scale,
        )
        for start in range(0, len(one.samples), batch):
            drawn = one.samples[start : start + batch]
            if all(sample.path.is_file() for sample in drawn):
                continue
            texts, seeds = [sample.prompt for sample in drawn], [sample.seed for sample in drawn]
            pictures = self._studio.pictures(self._studio.latents(texts, seeds, settings, batch_size=batch))
            for sample, picture in zip(drawn, pictures, strict=True):
                write_sample(sample.path, Sample(sample.prompt, sample.seed, picture))

    def _redraw(self, item: Item, sigma: float) -> Tensor:
        steps = max(1, round(sigma * self._evaluation.config.validation.num_inference_steps))
        device = self._accelerator.device
        return redraw(self._studio.transformer, item, sigma, steps, device, self._dtype)


@torch.no_grad()
def redraw(
    transformer: torch.nn.Module, item: Item, sigma: float, steps: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The latents of a picture, 1 C 1 h w, noised to `sigma` and denoised by `steps` equal Euler steps with its
    caption, without guidance. The noise is a function of the picture alone."""
    noise = torch.randn(item.latents.shape, generator=flow.generator("redraw", item.digest))
    sigmas = torch.linspace(sigma, 0, steps + 1)
    found = flow.interpolate(item.latents[None], noise[None], sigmas[:1]).to(device)
    prompt = item.prompt.to(device)[None]
    for now, then in pairwise(sigmas):
        predicted = qwen_image.predict_velocity(transformer, found.to(dtype), now[None].to(device), prompt, None)
        found = found + (then - now).to(device) * predicted.float()
    return found
