"""Pretrain the miniature SigLIP2 and DINOv3 to name a creature's traits; the published ones learned from the web.

The creatures are of the tier "pretrain", which has every trait of the world. Hypernetwork training shows fewer.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig, SiglipVisionModel

from demo import painter
from initializers.i2l import encoders
from trainer import flow
from trainer.loop import Loss, Measured
from trainer.tracking import Tracker

NUM_PICTURES, NUM_HELD_OUT = 30_000, 512
TRAITS: dict[str, tuple[str, ...]] = {
    "shape": painter.SHAPES,
    "colour": tuple(painter.HUES),
    "pattern": painter.PATTERNS,
    "pattern_colour": tuple(painter.HUES),
    "headgear": painter.HEADGEAR,
    "headgear_colour": tuple(painter.HUES),
    "num_eyes": ("1", "2", "3"),
    "belly": ("False", "True"),
    "patch_side": ("-1", "1"),
}
NUM_SHADES = 3
UNSEEN = -100  # the class of a trait that cannot be seen, such as a headgear's colour without one; it is not learned


def new_encoders() -> tuple[SiglipVisionModel, DINOv3ViTModel]:
    """Both encoders for 64x64 pixels in patches of 8, with random weights (seed 0)."""
    small: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        siglip = SiglipVisionModel(SiglipVisionConfig(hidden_act="gelu_pytorch_tanh", **small))
        bias: dict[str, Any] = {"query_bias": False, "key_bias": False, "value_bias": False}
        dinov3 = DINOv3ViTModel(
            DINOv3ViTConfig(num_register_tokens=4, hidden_act="silu", use_gated_mlp=True, **bias, **small)
        )
    return siglip, dinov3.eval()  # train mode would jitter positions


def save_encoders(siglip: SiglipVisionModel, dinov3: DINOv3ViTModel, folder: Path) -> None:
    """Write both in the published layout, in single precision."""
    encoders.save_siglip(siglip, folder / encoders.SIGLIP_FOLDER)
    encoders.save_dinov3(dinov3, folder / encoders.DINOV3_FOLDER)


def classes(who: painter.Identity) -> list[int]:
    """The class of each trait, in the order of `TRAITS`."""
    shows = {
        "pattern_colour": who.pattern != "plain",
        "headgear_colour": who.headgear != "nothing",
        "patch_side": who.pattern == "patches",
    }
    return [
        options.index(str(getattr(who, name))) if shows.get(name, True) else UNSEEN for name, options in TRAITS.items()
    ]


class Pictures:
    """Creatures in scenes, with what an encoder should name: pixels N 3 64 64 uint8, traits N T, shades N 3."""

    def __init__(self, seed: int, tier: painter.Tier, count: int):
        rng, pixels, traits, shades = np.random.default_rng([23, seed]), [], [], []
        for _ in tqdm(range(count), desc=f"paint creatures, {tier}", unit="picture"):
            who = painter.identity(tier, int(rng.integers(painter.TIER_SEEDS)))
            pixels.append(painter.paint(who, painter.scene(int(rng.integers(30, 2**31)))).transpose(2, 0, 1))
            traits.append(classes(who))
            shades.append(who.shade)
        self.pixels, self.traits = torch.from_numpy(np.stack(pixels)), torch.tensor(traits)
        self.shades = torch.tensor(shades, dtype=torch.float32)


class VisionObjective:
    """The loss: cross entropy of each trait and squared error of the shade, by each encoder's embedding alone."""

    def __init__(self, batch_size: int):
        self.siglip, self.dinov3 = new_encoders()
        outputs = sum(len(options) for options in TRAITS.values()) + NUM_SHADES
        heads = nn.ModuleList(nn.Linear(model.config.hidden_size, outputs) for model in (self.siglip, self.dinov3))
        self.module: nn.Module = nn.ModuleList([self.siglip, self.dinov3, heads])
        self._heads, self._batch_size = heads, batch_size
        self._train, self._held_out = Pictures(0, "pretrain", NUM_PICTURES), Pictures(1, "new", NUM_HELD_OUT)

    def _read(self, pixels: Tensor) -> list[tuple[Tensor, ...]]:
        """For each encoder: the logits of each trait, and then the shade."""
        siglip, dinov3 = encoders.square_pixels(
            pixels.float() / 255, self.siglip.config.image_size, self.dinov3.config.image_size
        )
        embeddings = encoders.embed_siglip(self.siglip, siglip), encoders.embed_dinov3(self.dinov3, dinov3)
        parts = [len(options) for options in TRAITS.values()] + [NUM_SHADES]
        return [head(part).split(parts, dim=1) for head, part in zip(self._heads, embeddings, strict=True)]

    def loss(self, step: int, micro_step: int) -> Loss:
        rows = torch.randint(NUM_PICTURES, (self._batch_size,), generator=flow.generator("vision", step, micro_step))
        value = torch.zeros(())
        for *logits, shade in self._read(self._train.pixels[rows]):
            for column, scores in enumerate(logits):
                named = F.cross_entropy(scores, self._train.traits[rows, column], ignore_index=UNSEEN, reduction="sum")
                value = value + named / len(rows)
            value = value + F.mse_loss(shade, self._train.shades[rows])
        return Loss(value, f"random creatures {step}")

    def validate(self, step: int, tracker: Tracker) -> Measured:
        """On creatures of the tier "new": share of traits that each encoder names, and squared error of the shades."""
        values = {}
        for name, (*logits, shade) in zip(("siglip", "dinov3"), self._read(self._held_out.pixels), strict=True):
            named = torch.stack([scores.argmax(1) for scores in logits], dim=1) == self._held_out.traits
            values[f"val_{name}"] = float(named[self._held_out.traits != UNSEEN].float().mean())
            values[f"val_{name}_shade"] = float(F.mse_loss(shade, self._held_out.shades))
        return Measured(values)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)
