"""Pictures that the base draws by itself, for Bias to learn from."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from trainer import qwen_image, validation
from trainer.files import new_folder, write_text
from trainer.qwen_image import ModelConfig
from trainer.validation import ValidationConfig


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

    Nothing, if `output` is there. The text encoder is gone before the transformer is loaded.
    """
    if output.exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = qwen_image.PromptEncoder(base, device, qwen_image.DTYPES[dtype])
    texts = [validation.EMPTY_PROMPT, *prompts]
    embeds = [encoder([text])[0] for text in tqdm(texts, "encode prompts", unit="prompt", disable=None)]
    del encoder
    transformer = qwen_image.load_transformer(ModelConfig(base=base, dtype=dtype), device)
    settings = ValidationConfig(num_inference_steps=num_inference_steps, true_cfg_scale=true_cfg_scale)
    bar = tqdm(embeds[1:], "draw", unit="picture", disable=None)
    pictures = validation.draw_samples(transformer, settings, base, bar, embeds[0], size)
    with new_folder(output) as folder:
        for number, (text, picture) in enumerate(zip(prompts, pictures, strict=True)):
            validation.write_png(folder / f"{number:05d}.png", picture)
            write_text(folder / f"{number:05d}.txt", text + "\n")
