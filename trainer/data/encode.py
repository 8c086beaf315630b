"""Pictures to latents and captions to prompt_embeds, through the cache.

An encoder is loaded only if something is missing from the cache. The VAE is gone when the function returns; the text
encoder stays until its `unload` is called, since others may need it too.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer import qwen_image
from trainer.data.cache import Cache, key
from trainer.data.dataset import Example, load_picture
from trainer.qwen_image import TextEncoder


def encode_pictures(
    cache: Cache, base: str, examples: Sequence[Example], device: torch.device, *, quiet: bool
) -> list[Tensor]:
    """Normalised latents of each example, C 1 h w in fp32 on the CPU."""
    model, vae = qwen_image.identity(base), None
    small = all(width * height <= 128 * 128 for width, height in (e.bucket for e in examples))

    def compute(positions: list[int]) -> list[Tensor]:
        nonlocal vae
        vae = vae or qwen_image.load_vae(base, device)
        latents: dict[int, Tensor] = {}
        for bucket in {examples[i].bucket for i in positions}:
            same = [i for i in positions if examples[i].bucket == bucket]
            encoded = qwen_image.encode_pictures(vae, [load_picture(examples[i]) for i in same])
            latents.update(zip(same, encoded, strict=True))
        return [latents[i] for i in positions]

    keys = [key("latents", model, e.digest, e.bucket) for e in examples]
    names = [str(e.path) for e in examples]
    return cache.get(keys, compute, what="encode pictures", names=names, batch_size=32 if small else 1, quiet=quiet)


def encode_prompts(
    cache: Cache,
    text_encoder: TextEncoder,
    dtype: torch.dtype,
    texts: Iterable[str],
    *,
    batch_size: int = 1,
    quiet: bool,
) -> dict[str, Tensor]:
    """prompt_embeds of each text, L D in `dtype` on the CPU.

    One by one, an embedding depends on its text alone. In a batch its last digits depend on the texts beside it, so
    that another prompt for validation would change training.
    """
    model, encoder, ordered = text_encoder.identity(), None, sorted(set(texts))

    def compute(positions: list[int]) -> list[Tensor]:
        nonlocal encoder
        encoder = encoder or qwen_image.PromptEncoder(text_encoder, dtype)
        return encoder([ordered[i] for i in positions])

    keys = [key("prompt_embeds", model, str(dtype), qwen_image.PROMPT_LIMIT, text) for text in ordered]
    names = [f'"{text}"' for text in ordered]
    found = cache.get(keys, compute, what="encode captions", names=names, batch_size=batch_size, quiet=quiet)
    return dict(zip(ordered, found, strict=True))
