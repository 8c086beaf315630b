"""Measure whether the pipeline draws what the prompt says: a small classifier reads it, trained on painted ones."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from demo import painter
from trainer import flow, qwen_image
from trainer.validation import grid, write_png

TRAITS: dict[str, tuple[str, ...]] = {
    "shape": painter.SHAPES,
    "colour": tuple(painter.HUES),
    "pattern": painter.PATTERNS,
    "headgear": painter.HEADGEAR,
    "eyes": ("1", "2", "3"),
    "background": tuple(painter.BACKGROUNDS),
    "place": tuple(painter.PLACES),
    "size": painter.SIZES,
}
TRAIN_STEPS, BATCH_SIZE = 700, 64
NUM_PROMPTS = 200
NUM_INFERENCE_STEPS, TRUE_CFG_SCALE = 20, 2.0


class Classifier(nn.Module):
    """Pixels, B 3 64 64 in [0, 1] -> trait -> logits, B values."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in TRAITS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}


def traits_of(who: painter.Identity, where: painter.Scene) -> dict[str, int]:
    """Trait -> index of its value in `TRAITS`."""
    values = {
        "shape": who.shape,
        "colour": who.colour,
        "pattern": who.pattern,
        "headgear": who.headgear,
        "eyes": str(who.num_eyes),
        "background": where.background,
        "place": where.place,
        "size": where.size,
    }
    return {name: TRAITS[name].index(value) for name, value in values.items()}


def train_classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=TRAIN_STEPS)
    for step in tqdm(range(TRAIN_STEPS), desc="train the classifier", unit="step"):
        rng = np.random.default_rng([17, step])
        pairs = [
            (painter.identity("pretrain", int(i)), painter.scene(int(s)))
            for i, s in zip(
                rng.integers(painter.TIER_SEEDS, size=BATCH_SIZE), rng.integers(30, 2**31, BATCH_SIZE), strict=True
            )
        ]
        pixels = _pixels([painter.paint(*pair) for pair in pairs])
        blur = torch.rand(1, generator=flow.generator(17, step)).item()
        pixels = torch.lerp(
            pixels, F.avg_pool2d(pixels, 3, 1, 1), blur
        )  # the VAE's pictures are softer than painted ones
        logits, labels = model(pixels), [traits_of(*pair) for pair in pairs]
        loss = torch.stack(
            [F.cross_entropy(logits[n], torch.tensor([row[n] for row in labels])) for n in TRAITS]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _pixels(pictures: list[painter.Image] | list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, dtype=np.float32) for p in pictures])).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def accuracy(model: Classifier, pictures: list[Image.Image], labels: list[dict[str, int]]) -> dict[str, float]:
    """Trait -> share of pictures in which the classifier sees the value that was asked for."""
    logits = model(_pixels(pictures))
    return {
        name: round(float((logits[name].argmax(1) == torch.tensor([row[name] for row in labels])).float().mean()), 3)
        for name in TRAITS
    }


def measure_prompts(model_folder: Path, sheet: Path) -> dict[str, dict[str, float]]:
    """Draw prompts of held-out creatures (tier "new", with their traits) and read the drawings with the classifier.

    Returns the accuracy for each trait on the drawings, on painted pictures, and on painted pictures that went through
    the VAE. `sheet` shows the first drawings below the painted pictures of the same words.
    """
    classifier = train_classifier()
    pairs = [(painter.identity("new", 1000 + i), painter.scene(700 + i)) for i in range(NUM_PROMPTS)]
    labels = [traits_of(*pair) for pair in pairs]
    base, device = str(model_folder), torch.device("cpu")
    vae = qwen_image.load_vae(base, device)
    painted = [Image.fromarray(painter.paint(*pair)) for pair in pairs]
    decoded = [p for i in range(0, NUM_PROMPTS, 50) for p in _through(vae, painted[i : i + 50])]
    encode = qwen_image.PromptEncoder(qwen_image.TextEncoder(base, device), torch.float32)
    prompts = encode([painter.caption(where, who) for who, where in pairs])
    negative = encode([qwen_image.EMPTY_PROMPT])[0]  # the base was pretrained with it
    transformer = qwen_image.load_transformer(qwen_image.ModelConfig(base=base, dtype="fp32"), device)
    sampler = qwen_image.Sampler(base)
    drawn = []
    for numbers in tqdm(torch.arange(NUM_PROMPTS).split(20), desc="draw prompts", unit="20 pictures"):
        latents = sampler.latents(
            transformer,
            [prompts[number] for number in numbers],
            size=(painter.SIZE, painter.SIZE),
            seeds=numbers.tolist(),
            num_inference_steps=NUM_INFERENCE_STEPS,
            true_cfg_scale=TRUE_CFG_SCALE,
            negative_prompt=negative,
            batch_size=len(numbers),
        )
        drawn += qwen_image.decode_latents(vae, latents)
    rows = [part for i in (0, 8, 16) for part in (painted[i : i + 8], drawn[i : i + 8])]
    write_png(sheet, grid(rows, [""] * 8, ["painted", "drawn from the same words"] * 3))
    return {
        "drawn": accuracy(classifier, drawn, labels),
        "painted": accuracy(classifier, painted, labels),
        "painted, through the VAE": accuracy(classifier, decoded, labels),
    }


def _through(vae: AutoencoderKLQwenImage, pictures: list[Image.Image]) -> list[Image.Image]:
    return qwen_image.decode_latents(vae, qwen_image.encode_pictures(vae, pictures))
