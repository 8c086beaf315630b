"""Flow matching as Qwen-Image does it: sigmas, noise, interpolation, the velocity, the loss. Pure tensors.

x_sigma = (1 - sigma) * x_0 + sigma * noise        the model is given timestep = sigma and predicts
velocity = noise - x_0                             (rectified flow, Liu et al. 2022, arXiv:2209.03003)
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator that is a function of its keys alone, such as (seed, "noise", step, micro_step)."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def seeded(random: torch.Generator, device: torch.device) -> Iterator[None]:
    """Inside, layers that draw from the global random state, such as dropout, depend on `random` alone. Outside, that
    state is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=random)))
        yield


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """`[flow]`"""

    sigma_sampling: Literal["logit_normal", "uniform", "shift", "resolution_shift"] = "logit_normal"
    """How the noise levels (sigmas) are drawn. logit_normal: the sigmoid of a normal number. uniform: every sigma is as
    likely. shift: logit_normal, moved by `shift`. resolution_shift: logit_normal, moved by Qwen-Image's own rule: more
    noise for larger pictures."""
    shift: float | None = None
    """The s of sigma -> s * sigma / (1 + (s - 1) * sigma). Above 1 there is more noise. Only with sigma_sampling =
    "shift"."""

    def problems(self) -> list[str]:
        if self.sigma_sampling == "shift":
            return [] if self.shift and self.shift > 0 else ['shift must be above 0 with sigma_sampling = "shift"']
        if self.shift is not None:
            return [f'shift has no effect with sigma_sampling = "{self.sigma_sampling}"; it needs "shift"']
        return []


def sample_sigmas(config: FlowConfig, count: int, num_image_tokens: int, random: torch.Generator) -> Tensor:
    """`count` sigmas in (0, 1), fp32, on the CPU."""
    if config.sigma_sampling == "uniform":
        return torch.rand(count, generator=random)
    sigmas = torch.sigmoid(torch.randn(count, generator=random))
    if config.sigma_sampling == "shift":
        assert config.shift is not None
        return shifted(sigmas, config.shift)
    if config.sigma_sampling == "resolution_shift":
        return shifted(sigmas, math.exp(resolution_mu(num_image_tokens)))
    return sigmas


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """s * sigma / (1 + (s - 1) * sigma), as FlowMatchEulerDiscreteScheduler moves its sigmas."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_mu(num_image_tokens: int) -> float:
    """log of the shift in Qwen-Image's scheduler: linear in the image tokens, 256 -> 0.5 and 8192 -> 0.9."""
    return 0.5 + (num_image_tokens - 256) * (0.9 - 0.5) / (8192 - 256)


def stratified_sigmas(count: int) -> Tensor:
    """(i + 0.5) / count: the sigmas of the stable loss, evenly over (0, 1)."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma. latents, noise: B ...; sigmas: B."""
    sigmas = sigmas.to(latents).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model shall predict."""
    return noise - latents


def losses(predicted: Tensor, latents: Tensor, noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of the velocity for each sample, fp32, shape B. weights: how much each of its numbers counts,
    of mean 1, and of a shape that can be expanded to that of latents."""
    errors = (predicted.float() - velocity(latents, noise).float()).square()
    return (errors if weights is None else errors * weights).flatten(1).mean(1)
