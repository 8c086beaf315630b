"""Pictures that the base draws by itself, for Bias to learn from."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import qwen_image, validation
from trainer.data.cache import Cache, key
from trainer.files import DTYPES, new_folder, write_text
from trainer.qwen_image import ModelConfig


def draw(
    base: str,
    prompts: Sequence[str],
    output: Path,
    *,
    size: tuple[int, int],
    num_inference_steps: int,
    true_cfg_scale: float = 1.0,
    dtype: qwen_image.Dtype = "fp32",
) -> None:
    """A PNG for each prompt, with the prompt beside it in a .txt; picture i from noise i.

    Nothing, if `output` is there, which appears whole. Killed, it goes on with what it has drawn: latents are kept
    beside `output` within a minute. The text encoder is gone before the transformer is loaded.
    """
    if output.exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = qwen_image.PromptEncoder(qwen_image.TextEncoder(base, device), DTYPES[dtype])
    texts = [qwen_image.NEGATIVE_PROMPT, *prompts]
    empty, *embeds = [encoder([text])[0] for text in tqdm(texts, "encode prompts", unit="prompt", disable=None)]
    del encoder
    transformer = qwen_image.load_transformer(ModelConfig(base=base, dtype=dtype), device)
    sampler = qwen_image.Sampler(base)

    def sample(numbers: list[int]) -> list[Tensor]:
        return [
            sampler.latents(
                transformer,
                [embeds[number]],
                size=size,
                seeds=[number],
                num_inference_steps=num_inference_steps,
                true_cfg_scale=true_cfg_scale,
                negative_prompt=empty,
            ).cpu()
            for number in numbers
        ]

    drawn = output.with_name(f".{output.name}.latents")
    made_with = (qwen_image.identity(base), dtype, size, num_inference_steps, true_cfg_scale)
    keys = [key("draw", made_with, number, text) for number, text in enumerate(prompts)]
    latents = Cache(drawn).get(keys, sample, what="draw")
    vae = qwen_image.load_vae(base, device)
    with new_folder(output) as folder:
        for number, (text, one) in enumerate(zip(prompts, latents, strict=True)):
            validation.write_png(folder / f"{number:05d}.png", qwen_image.decode_latents(vae, one)[0])
            write_text(folder / f"{number:05d}.txt", text + "\n")
    shutil.rmtree(drawn)
