"""What is computed with each LoRA on the base: errors, redrawn pictures, drift, samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trainer import adapter, flow, measure, qwen_image
from trainer.data.cache import Cache
from trainer.data.encode import encode_pictures
from trainer.errors import UserError
from trainer.evaluate.plan import Candidate, Evaluation
from trainer.files import DTYPES
from trainer.studio import Settings, Studio, Worn, read_file
from trainer.validation import Item


@dataclass(frozen=True)
class Seen:
    """What was seen of a LoRA."""

    candidate: Candidate
    origin: dict[str, object]
    errors: Tensor  # N 8
    """The stable error of each held-out picture at each sigma."""
    redrawn: dict[float, list[Image.Image]]
    """Sigma -> each held-out picture."""
    drift: float | None
    samples: list[Image.Image]
    """Those of a prompt together, in the order of their seeds."""


class Examiner:
    """The base, held-out pictures encoded, and all that is the same for each LoRA."""

    def __init__(self, evaluation: Evaluation, accelerator: Accelerator, *, quiet: bool):
        self._evaluation, self._accelerator, self._quiet = evaluation, accelerator, quiet
        run, device = evaluation.config, accelerator.device
        self._dtype, self._batch = DTYPES[run.model.dtype], 2 * run.train.batch_size  # no gradients: there is more room
        self._studio = Studio(run.model, device, evaluation.cache, quiet=quiet)
        examples = evaluation.looked_at
        latents = encode_pictures(Cache(evaluation.cache), run.model.base, examples, device, quiet=quiet)
        texts = {*evaluation.prompts, *run.validation.unrelated_prompts, qwen_image.EMPTY_PROMPT}
        prompts = self._studio.encode(texts | {example.caption for example in examples})
        self.items = [
            Item(example.name, example.digest, own, prompts[example.caption])
            for example, own in zip(examples, latents, strict=True)
        ]
        transformer = self._studio.transformer
        self._passes = measure.Passes(transformer, accelerator, self._dtype, self._batch)
        unrelated = [prompts[text] for text in run.validation.unrelated_prompts]
        self._drift = (
            measure.Drift(self._passes, unrelated, latents[0].shape, lambda: adapter.switched_off(transformer))
            if unrelated
            else None
        )

    def originals(self) -> list[Image.Image]:
        """The held-out pictures as the VAE gives them back."""
        return [picture for item in self.items for picture in self._studio.pictures(item.latents[None])]

    def see(self, candidates: Sequence[Candidate]) -> Iterator[Seen]:
        """One after the other, with a bar."""
        for candidate in tqdm(candidates, "evaluate", unit="LoRA", disable=self._quiet or None, dynamic_ncols=True):
            worn = []
            if candidate.path is not None and candidate.file is not None:
                worn = [read_file(candidate.path, candidate.file, candidate.strength)]
            with self._studio.wearing(worn):
                seen = self._see(candidate, worn)
            yield seen

    def _see(self, candidate: Candidate, worn: Sequence[Worn]) -> Seen:
        """UserError if it gives no finite numbers."""
        evaluation, request = self._evaluation, self._evaluation.request
        errors = self._passes.errors(self.items)[..., 0].cpu()
        if not bool(errors.isfinite().all()):
            raise UserError(
                f"{candidate.name}: its stable losses are NaN or infinite. Give it a lower strength, as "
                f"FILE:0.5; in fp16, {qwen_image.NAN_ADVICE}"
            )
        redrawn = {
            sigma: [picture for item in self.items for picture in self._studio.pictures(self._redraw(item, sigma))]
            for sigma in request.sigmas
        }
        run = evaluation.config.validation
        settings = Settings(
            size=evaluation.dataset.train[0].bucket,
            num_inference_steps=run.num_inference_steps,
            true_cfg_scale=run.true_cfg_scale,
        )
        texts = [text for text in evaluation.prompts for _ in range(request.seeds)]
        seeds = [run.seed + number for _ in evaluation.prompts for number in range(request.seeds)]
        batch = evaluation.config.train.batch_size
        drawn = self._studio.latents(texts, seeds, settings, batch_size=batch)
        return Seen(
            candidate,
            {key: value for one in worn for key, value in one.origin.items()},
            errors,
            redrawn,
            self._drift() if self._drift else None,
            self._studio.pictures(drawn),
        )

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
