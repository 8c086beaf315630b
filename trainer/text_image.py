"""How well pictures fit their prompts, by a SigLIP that reads text: `[validation] text_image_model`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.hub import sources
from trainer.hub.sources import Need

CHUNK = 16  # pictures embedded together


def text_image_need(source: str) -> Need:
    """Its files, to be fetched and checked."""
    return Need(source, ("config.json", "model*.safetensors"), ("*.json", "*.txt", "*.model"))


def text_image_problems(source: str) -> list[str]:
    """What is wrong with `[validation] text_image_model`, if it is set."""
    if not source:
        return []
    from transformers import AutoConfig

    try:
        if (file := sources.config_file(source, "config.json")) is None:
            return []  # no network now: told when it is fetched
        found = AutoConfig.from_pretrained(file.parent)
    except (OSError, ValueError) as error:
        return [f"[validation] text_image_model: {error}"]
    if problems := sources.check(text_image_need(source)):
        return [f"[validation] text_image_model: {problem}" for problem in problems]
    if all(hasattr(found, name) for name in ("text_config", "vision_config")):
        return []
    return [f"[validation] text_image_model: {source} is a {found.model_type}; a SigLIP with a text tower is needed"]


@torch.no_grad()
def text_image_cosines(
    source: str, pictures: Sequence[Image.Image], texts: Sequence[str], device: torch.device
) -> Tensor:
    """How well each picture fits its text, by a SigLIP with both towers: N"""
    from transformers import AutoModel, AutoTokenizer

    folder = sources.local(source)
    model: Any = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    found = []
    for start in range(0, len(pictures), CHUNK):
        some = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures[start : start + CHUNK]]
        pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in some])) / 127.5 - 1
        tokens = tokenizer(
            list(texts[start : start + CHUNK]),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        images = model.vision_model(pixel_values=pixels.permute(0, 3, 1, 2).to(device, model.dtype)).pooler_output
        words = model.text_model(input_ids=tokens.input_ids.to(device)).pooler_output
        found.append(torch.cosine_similarity(images.float(), words.float()).cpu())
    return torch.cat(found)
