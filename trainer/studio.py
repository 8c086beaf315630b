"""Draw with a base and LoRAs on it, without training: what `draw` and `evaluate` share."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from trainer import adapter, qwen_image
from trainer.adapter import AdapterWeights
from trainer.data.cache import Cache
from trainer.data.encode import encode_prompts
from trainer.files import DTYPES, content_hash
from trainer.formats.asked import Asked
from trainer.formats.lora import MOST_RANK
from trainer.hub import sources
from trainer.lowrank import LowRank, concatenate, scale
from trainer.qwen_image import EMPTY_PROMPT, ModelConfig

log = logging.getLogger("trainer")


def look_at(
    model: ModelConfig, device: torch.device, problems: list[str]
) -> tuple[dict[str, tuple[int, int]] | None, int]:
    """in_features and out_features of the base's Linear layers, None if they cannot be had; and of how many pixels the
    sides of pictures are multiples. What is wrong with the base, or not to be had on the device, is added to
    `problems`."""
    wrong = [f"[model] base: {problem}" for problem in sources.check(qwen_image.need(model.base))]
    problems += [*wrong, *qwen_image.gpu_problems(model, device)]
    if wrong:
        return None, qwen_image.PICTURE_MULTIPLE
    return adapter.linears(qwen_image.transformer_on_meta(model.base)), qwen_image.picture_multiple(model.base)


@dataclass(frozen=True)
class Worn:
    """A LoRA, and how strongly it is put on: 1 is its own effect."""

    name: str
    weights: AdapterWeights
    strength: float = 1.0
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What it was made of, for the metadata of pictures: `file` and `sha256`, or `pictures`."""

    def told(self) -> dict[str, Any]:
        return {"name": self.name, "strength": self.strength, **self.origin}


def read_worn(asked: Asked) -> Worn:
    """A LoRA as it is; of a LoHa or LoKr the nearest LoRA of rank `MOST_RANK`, and the log says what is lost."""
    path, file = asked.path, asked.file
    weights, _ = file.read(MOST_RANK)
    if weights.lost and (kept := weights.kept()["total"]) < 0.9995:
        log.info("%s is a %s: drawn at rank %d, with %.1f %% of its energy", path, file.method, MOST_RANK, 100 * kept)
    return Worn(path.stem, weights, asked.strength, {"file": str(path), "sha256": content_hash(file.path)})


def together(worn: Sequence[Worn]) -> AdapterWeights:
    """The LoRAs at their strengths as one: the sum of their dW, concatenated on rank."""
    parts = dict[str, list[LowRank]]()
    for one in worn:
        if one.strength:
            for name, factors in one.weights.factors.items():
                parts.setdefault(name, []).append(scale(factors, one.strength))
    return AdapterWeights({name: concatenate(own) for name, own in parts.items()})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are drawn."""

    size: tuple[int, int]
    """Width and height in pixels."""
    num_inference_steps: int
    true_cfg_scale: float


class Studio:
    """The base, loaded when it is first asked for, after the text encoder has gone."""

    def __init__(self, model: ModelConfig, device: torch.device, cache: Path, *, quiet: bool = False):
        self.model, self.device, self.quiet = model, device, quiet
        self.text_encoder = qwen_image.text_encoder(model, device)
        self.prompts = dict[str, Tensor]()  # text -> L D
        self._cache = Cache(cache)

    def encode(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """prompt_embeds, L D, of each text, from the cache where it has them; kept for `latents`, too."""
        wanted = {*texts}
        missing = wanted - self.prompts.keys()
        dtype = DTYPES[self.model.dtype]
        self.prompts |= encode_prompts(self._cache, self.text_encoder, dtype, missing, quiet=self.quiet)
        return {text: self.prompts[text] for text in wanted}

    @cached_property
    def transformer(self) -> QwenImageTransformer2DModel:
        self.text_encoder.unload()
        return qwen_image.load_transformer(self.model, self.device)

    @cached_property
    def vae(self) -> AutoencoderKLQwenImage:
        return qwen_image.load_vae(self.model.base, self.device)

    @cached_property
    def _sampler(self) -> qwen_image.Sampler:
        return qwen_image.Sampler(self.model.base)

    def unload(self) -> None:
        """Free the memory of all that was loaded; what is asked for again is loaded again."""
        self.text_encoder.unload()
        for name in ("transformer", "vae"):
            self.__dict__.pop(name, None)
        qwen_image.free_memory()

    @contextmanager
    def wearing(self, worn: Sequence[Worn]) -> Iterator[None]:
        """Inside, these LoRAs are on the base, all at once. AdapterError if one does not fit."""
        weights = together(worn)
        handles = adapter.attach_frozen(self.transformer, weights) if weights.factors else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def with_negative(self, worn: Sequence[Worn]) -> AbstractContextManager[Callable[[], AbstractContextManager[None]]]:
        """LoRAs for the negative branch of guidance alone, which then has no others: to be handed to `latents`."""
        return adapter.with_other(self.transformer, together(worn))

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        negative: Callable[[], AbstractContextManager[None]] | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Normalised latents N C 1 h w of each prompt, drawn from the noise of its seed, with what is worn now."""
        embeds = self.encode({*prompts, EMPTY_PROMPT})
        return self._sampler.latents(
            self.transformer,
            [embeds[text] for text in prompts],
            size=settings.size,
            seeds=seeds,
            num_inference_steps=settings.num_inference_steps,
            true_cfg_scale=settings.true_cfg_scale,
            negative_prompt=embeds[EMPTY_PROMPT],
            negative=negative,
            batch_size=batch_size,
            device=self.device,
        )

    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of normalised latents N C 1 h w."""
        return qwen_image.decode_latents(self.vae, latents)
