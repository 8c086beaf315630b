"""See whether training helps: the stable loss, and sample pictures with fixed seeds on one contact sheet."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from trainer import flow, qwen_image
from trainer.data.captions import CaptionError, clean
from trainer.files import write_file

log = logging.getLogger("trainer")
NUM_SIGMAS = 8
GREY = "grey"  # in place of a LoRA file: what i2L predicts from grey pictures


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """`[validation]`"""

    every: int = 100
    """The number of steps between validations. There is one before the first step and one after the last, too."""
    prompts: tuple[str, ...] = ()
    """For each of these prompts a sample picture is drawn, always from the same noise."""
    unrelated_prompts: tuple[str, ...] = ()
    """Prompts that have nothing to do with the subject. Validations measure how far the velocity for them has moved
    from the base's (`drift`), which takes eight forward passes each; `--compare` measures it by samples."""
    text_image_model: str = ""
    """A SigLIP with a text tower, such as "google/siglip2-so400m-patch16-384": a folder or an id, as `[model] base`.
    With it `--compare` measures how well samples fit their prompts."""
    num_inference_steps: int = 20
    """The number of denoising steps of a sample picture."""
    num_pictures: int = 8
    """How many held-out pictures, and how many training pictures, the stable losses are computed on at most."""
    true_cfg_scale: float = 1.0
    """The strength of guidance in samples. 1 is no guidance, and takes half the time."""
    negative_lora: str = ""
    """A LoRA, FILE or FILE:STRENGTH, that the negative branch of guidance is drawn with, instead of the one that is
    trained. "grey" is what i2L predicts from grey pictures, as many and as large as it reads, with `[init] method =
    "i2l"`. It needs true_cfg_scale above 1. Training does not change by it."""
    seed: int = 0
    """Decides the noise of the samples."""
    patience: int = 0
    """The run ends when so many validations in a row have found no better step. It needs held-out pictures. 0: it goes
    on to its last step. `--compare` trains all runs to the end."""
    diagnose: bool = False
    """Name training pictures that may have a wrong caption, or show another subject: before the first step, the errors
    of each are computed with the base, without its caption, and, with i2L, with the seed of the others. This takes
    sixteen or twenty-four forward passes for each picture, once. `run.html` shows what came of it."""
    likeness: bool = False
    """Measure how much the samples resemble real pictures, by the image encoders of `[init.i2l]`, at each validation.
    They are read from the disk each time: for the published ones, 16 GB."""

    def problems(self) -> list[str]:
        # two inference steps: the scheduler moves its last sigma, and were it also the first, it would divide 0 by 0
        least = {"every": 1, "num_inference_steps": 2, "num_pictures": 1, "true_cfg_scale": 1}
        found = [f"{name} must be at least {value}" for name, value in least.items() if getattr(self, name) < value]
        if self.negative_lora and self.true_cfg_scale == 1:
            found.append("negative_lora has no effect with true_cfg_scale = 1, which has no negative branch")
        if self.patience < 0:
            found.append("patience must not be negative")
        for name in ("prompts", "unrelated_prompts"):
            for prompt in getattr(self, name):
                try:
                    clean(prompt)
                except CaptionError as error:
                    found.append(f'{name}: "{prompt}" {error}')
        return found


@dataclass(frozen=True)
class Item:
    """One picture with its caption, encoded."""

    name: str
    digest: str
    latents: Tensor  # C 1 h w
    prompt: Tensor  # L D
    weights: tuple[Tensor, ...] = ()
    """Ways to weigh the errors at its latents, each 1 1 h w, for `weighted_errors`."""


def stable_errors(
    transformer: torch.nn.Module,
    items: Sequence[Item],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int = NUM_SIGMAS,
    seed: int = 0,
    chosen: Sequence[int] = range(NUM_SIGMAS),
) -> Tensor:
    """The velocity error of each item (first axis) at sigmas (i + 0.5) / 8 (second axis), each item with noise of its
    own, always the same. Their mean is the stable loss.

    Most of the noise of a training loss is the draw of sigmas and noise; here both are fixed, so that two values
    differ only by the model. `batch_size` sigmas are computed together; another `seed` is another draw of the noise;
    `chosen` are the numbers i of the sigmas that are wanted.
    """
    return weighted_errors(transformer, items, device, dtype, batch_size=batch_size, seed=seed, chosen=chosen)[..., 0]


@torch.no_grad()
def weighted_errors(
    transformer: torch.nn.Module,
    items: Sequence[Item],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int = NUM_SIGMAS,
    seed: int = 0,
    chosen: Sequence[int] = range(NUM_SIGMAS),
) -> Tensor:
    """The same by a third axis: with all latents alike, then in each of the ways in which the items weigh theirs."""
    losses = []
    for item in items:
        random = flow.generator("stable loss", item.digest, *([seed] if seed else []))
        all_noise = torch.randn(NUM_SIGMAS, *item.latents.shape, generator=random)
        for rows in torch.tensor([*chosen]).split(batch_size):
            sigmas, noise = flow.stratified_sigmas(NUM_SIGMAS)[rows].to(device), all_noise[rows].to(device)
            latents = item.latents.to(device).expand_as(noise)
            noisy = flow.interpolate(latents, noise, sigmas).to(dtype)
            prompt = item.prompt.to(device).expand(len(rows), -1, -1)
            predicted = qwen_image.predict_velocity(transformer, noisy, sigmas, prompt, None)
            ways = (None, *(weights.to(device) for weights in item.weights))
            losses.append(torch.stack([flow.losses(predicted, latents, noise, way) for way in ways], dim=-1))
    return torch.cat(losses).view(len(items), len(chosen), -1)


@dataclass(frozen=True)
class Sample:
    """A picture with what it was drawn from."""

    prompt: str
    seed: int
    picture: Image.Image


def write_samples(output: Path, step: int, samples: Sequence[Sample]) -> None:
    """The samples of a step, and the contact sheet with those of all steps."""
    save_samples(output / "samples", step, samples)
    sheet = contact_sheet(output / "samples")
    if sheet is not None:
        write_png(output / "contact_sheet.png", sheet)


def save_samples(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """`folder/step-<step>-<row>.png`, with prompt and seed in the file. Each prompt and seed has a row of its own: a
    changed prompt gets a new one below those that are there."""
    rows = {told: number for number, told in sample_rows(folder).items()}
    for sample in samples:
        told = sample.prompt, str(sample.seed)
        row = rows.setdefault(told, max(rows.values(), default=-1) + 1)
        write_sample(folder / f"step-{step:06d}-{row}.png", sample)


def write_sample(path: Path, sample: Sample, **more: str) -> None:
    """As PNG, with `prompt`, `seed` and what else is given as text in it."""
    told = PngInfo()
    for name, text in {"prompt": sample.prompt, "seed": str(sample.seed), **more}.items():
        told.add_itxt(name, text)
    write_file(path, lambda partial: sample.picture.save(partial, "PNG", pnginfo=told))


def sample_rows(folder: Path) -> dict[int, tuple[str, str]]:
    """Row -> prompt and seed of the samples in a folder, as their files tell; empty texts where they do not."""
    files = {_numbers(path)[1]: path for paths in sample_files(folder).values() for path in paths}
    found = {}
    for row in sorted(files):
        told = picture.info if (picture := _opened(files[row])) else {}
        found[row] = str(told.get("prompt", "")), str(told.get("seed", ""))
    return found


def sample_files(folder: Path) -> dict[int, list[Path]]:
    """The samples in a folder by step, those of a step in the order of their prompts (and of the noise of each)."""
    found: dict[int, list[Path]] = {}
    for path in folder.glob("step-*-*.png"):
        found.setdefault(int(path.stem.split("-")[1]), []).append(path)
    return {step: sorted(found[step], key=_numbers) for step in sorted(found)}


def _numbers(path: Path) -> list[int]:
    """Those of the name: as text, 10 would come before 2."""
    return [int(number) for number in path.stem.split("-")[1:]]


def contact_sheet(folder: Path) -> Image.Image | None:
    """All samples in `folder`: a row for each prompt, a column for each step; None if there are none."""
    rows, steps = sample_rows(folder), list(sample_files(folder))
    if len(steps) > 10:  # the first, the last, and eight between
        steps = [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)]
    cells = [[_opened(folder / f"step-{step:06d}-{row}.png") for step in steps] for row in rows]
    titled = [(row, prompt) for row, (prompt, _) in zip(cells, rows.values(), strict=True) if any(row)]
    if not titled:
        return None
    return grid([row for row, _ in titled], [f"step {step}" for step in steps], [prompt for _, prompt in titled])


def _opened(file: Path) -> Image.Image | None:
    """None if it is not there, or is damaged: a sheet is no reason to stop a run."""
    if not file.exists():
        return None
    try:
        with Image.open(file) as picture:
            picture.load()
        return picture
    except (OSError, SyntaxError, ValueError) as error:
        log.warning("%s is damaged, and left out of the contact sheet (%s)", file, error)
        return None


def grid(rows: Sequence[Sequence[Image.Image | None]], columns: Sequence[str], titles: Sequence[str]) -> Image.Image:
    """Pictures in rows, or gaps, with a title above each row and a label above each column; small ones are enlarged."""
    side = max(max(picture.size) for row in rows for picture in row if picture)
    side = side * max(1, round(160 / side)) if side < 160 else min(side, 320)
    gap, line, font = 6, 20, ImageFont.load_default(13)
    width = gap + max(len(row) for row in rows) * (side + gap)
    sheet = Image.new("RGB", (width, line + gap + len(rows) * (side + line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((gap + column * (side + gap), 4), label, "black", font)
    for index, (row, title) in enumerate(zip(rows, titles, strict=True)):
        top = line + gap + index * (side + line + gap)
        draw.text((gap, top), _shortened(title, width - 2 * gap, font), "#555555", font)
        for column, picture in enumerate(row):
            if picture is None:
                continue
            scale = side / max(picture.size)
            fitted = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
            sheet.paste(fitted, (gap + column * (side + gap), top + line))
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def write_png(path: Path, picture: Image.Image) -> None:
    write_file(path, lambda partial: picture.save(partial, "PNG"))
