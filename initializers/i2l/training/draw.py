"""`python -m initializers.i2l draw`: pictures that the base draws by itself, for Bias to learn from."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trainer import qwen_image, validation
from trainer.config import ConfigError
from trainer.data.cache import Cache, key
from trainer.files import DTYPES, new_folder, write_text
from trainer.hardware import parallel
from trainer.hub import sources
from trainer.qwen_image import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are drawn."""

    size: tuple[int, int]
    """Width and height in pixels."""
    num_inference_steps: int
    true_cfg_scale: float = 1.0
    dtype: qwen_image.Dtype = "fp32"
    """Precision of the base."""


def draw_prompts(options: argparse.Namespace) -> None:
    """Draw a picture for each line of a file. ConfigError lists everything that is wrong with the arguments."""
    problems = [f"--{problem}" for problem in qwen_image.check_base(options.base)]
    problems = problems or [f"--base: {problem}" for problem in sources.check(qwen_image.need(options.base))]
    prompts = []
    if options.prompts.is_file():
        prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        problems.append(f"--prompts: {options.prompts} is not a text file with one prompt a line")
    if options.output.exists():
        problems.append(f"--output: {options.output} exists already; choose another name")
    if options.resolution < 1 or options.resolution % qwen_image.PICTURE_MULTIPLE:
        problems.append(f"--resolution must be a multiple of {qwen_image.PICTURE_MULTIPLE}")
    if problems:
        raise ConfigError(problems)
    sources.fetch([qwen_image.need(options.base)])
    settings = Settings(
        size=(options.resolution, options.resolution),
        num_inference_steps=options.num_inference_steps,
        true_cfg_scale=options.true_cfg_scale,
        dtype=options.dtype,
    )
    draw(options.base, prompts, options.output, settings)
    print(f"{options.output}: {len(prompts)} pictures, each with its prompt in a .txt file beside it")


def draw(base: str, prompts: Sequence[str], output: Path, settings: Settings) -> None:
    """A PNG for each prompt, with the prompt in a .txt beside it; the noise of picture i has the seed i.

    `output` appears whole; if it exists, nothing is done. If the program is stopped, it goes on with what it has drawn
    when it is called again: latents are kept beside `output` within a minute. The text encoder is freed before the
    transformer is loaded.
    """
    if output.exists():
        return
    device = parallel.one_device()
    negative, *embeds = _encode(base, [qwen_image.EMPTY_PROMPT, *prompts], settings.dtype, device)
    transformer = qwen_image.load_transformer(ModelConfig(base=base, dtype=settings.dtype), device)
    sampler = qwen_image.Sampler(base)
    steps, guidance = settings.num_inference_steps, settings.true_cfg_scale

    def sample(numbers: list[int]) -> list[Tensor]:
        return [
            sampler.latents(
                transformer,
                [embeds[number]],
                size=settings.size,
                seeds=[number],
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                negative_prompt=negative,
            ).cpu()
            for number in numbers
        ]

    drawn = output.with_name(f".{output.name}.latents")
    made_with = (qwen_image.identity(base), settings.dtype, settings.size, steps, guidance)
    keys = [key("draw", made_with, number, text) for number, text in enumerate(prompts)]
    latents = Cache(drawn).get(keys, sample, what="draw")
    vae = qwen_image.load_vae(base, device)
    with new_folder(output) as folder:
        for number, (text, one) in enumerate(zip(prompts, latents, strict=True)):
            validation.write_png(folder / f"{number:05d}.png", qwen_image.decode_latents(vae, one)[0])
            write_text(folder / f"{number:05d}.txt", text + "\n")
    shutil.rmtree(drawn)


def _encode(base: str, texts: Sequence[str], dtype: qwen_image.Dtype, device: torch.device) -> list[Tensor]:
    """prompt_embeds of each text; the text encoder is freed."""
    encoder = qwen_image.PromptEncoder(qwen_image.TextEncoder(base, device), DTYPES[dtype])
    return [encoder([text])[0] for text in tqdm(texts, "encode prompts", unit="prompt", disable=None)]
