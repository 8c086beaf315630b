"""Pretrain the miniature `AutoencoderKLQwenImage` on painted creatures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from demo import painter
from trainer.loop import Loss, Measured
from trainer.tracking import Tracker

L1_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 0.15, 0.1, 1e-4
NUM_BATCHES = 16  # of 32 pictures, on which `latents_mean` and `latents_std` are measured


def new_vae() -> AutoencoderKLQwenImage:
    """With random weights (seed 0), scaled so that the signal of a picture keeps its size through every convolution.

    With PyTorch's default weights it becomes three times smaller at each one, partly because two of three frames are
    zeros, and soon smaller than the biases: training then needs 2000 steps for what these weights reach in 200.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLQwenImage(base_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
        for name, layer in vae.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                height, width = layer.kernel_size[-2:]
                nn.init.normal_(layer.weight, std=(layer.in_channels * height * width) ** -0.5)
                layer.bias.data.zero_()  # type: ignore[union-attr]
                if name.endswith(".conv2"):
                    layer.weight.data *= 0.1
    return vae


@contextmanager
def single_frame_convolutions() -> Iterator[None]:
    """Compute causal 3-D convolutions over one frame as 2-D convolutions, in a third of the time.

    The result is the same: the frames before the first are zeros, so only the last temporal slice of a kernel matters.
    """

    def forward(self: QwenImageCausalConv3d, x: Tensor, cache_x: object = None) -> Tensor:
        assert x.shape[2] == 1, "more than one frame"  # x: B C 1 H W
        weight, padding = self.weight[:, :, -1], (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], weight, self.bias, self.stride[1:], padding).unsqueeze(2)

    original = QwenImageCausalConv3d.forward
    QwenImageCausalConv3d.forward = forward
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = original


def to_pixels(pictures: list[painter.Image]) -> Tensor:
    """Pictures as the VAE takes them: B 3 1 H W in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).unsqueeze(2).float() / 127.5 - 1


def random_pictures(seed: tuple[int, ...], count: int) -> list[painter.Image]:
    """Random creatures of the tier "pretrain" in random scenes."""
    rng = np.random.default_rng(seed)
    return [
        painter.paint(painter.identity("pretrain", int(rng.integers(painter.TIER_SEEDS))), painter.scene(int(s)))
        for s in rng.integers(30, 2**31, count)
    ]


class VaeObjective:
    """The loss: squared and absolute error of pixels, absolute error of edges, and a small KL term."""

    def __init__(self, batch_size: int):
        self.module: Any = new_vae()
        self._batch_size = batch_size
        self._held_out = to_pixels([painter.paint(painter.identity("new", i), painter.scene(i)) for i in range(30)])

    def loss(self, step: int, micro_step: int) -> Loss:
        pixels = to_pixels(random_pictures((1, step, micro_step), self._batch_size))
        with single_frame_convolutions():
            posterior = self.module.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = self.module.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        value = error.square().mean() + L1_WEIGHT * error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl
        return Loss(value, f"random creatures {step}")

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)

    def validate(self, step: int, tracker: Tracker) -> Measured:
        decoded = self.module.decode(self.module.encode(self._held_out).latent_dist.mean).sample
        return Measured({"val_psnr": psnr(decoded, self._held_out)})


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (decoded - pixels).square().mean()))


@torch.no_grad()
def finish(vae: AutoencoderKLQwenImage, folder: Path) -> float:
    """Measure `latents_mean` and `latents_std`, and write the VAE in half precision. Returns its PSNR in dB."""
    vae = vae.half().float()
    with single_frame_convolutions():
        codes = torch.cat(
            [vae.encode(to_pixels(random_pictures((2, i), 32))).latent_dist.mean for i in range(NUM_BATCHES)]
        )  # B C 1 h w
    mean, std = codes.mean(dim=(0, 2, 3, 4)), codes.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    held_out = to_pixels([painter.paint(painter.identity("new", i), painter.scene(i)) for i in range(30)])
    quality = psnr(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out)
    vae.half().save_pretrained(folder)
    return quality
