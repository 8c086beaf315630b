"""Flow matching as Qwen-Image does it: sigmas, noise, interpolation, the velocity, the loss. Pure tensors.

x_sigma = (1 - sigma) * x_0 + sigma * noise        the model is given timestep = sigma and predicts
velocity = noise - x_0                             (rectified flow, Liu et al. 2022, arXiv:2209.03003)
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
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

    sigma_sampling: Literal["logit_normal", "uniform", "shift", "uniform_shift", "resolution_shift"] = "logit_normal"
    """How the noise levels (sigmas) are drawn. logit_normal: the sigmoid of a normal number. uniform: every sigma is as
    likely. shift: logit_normal, moved by `shift`. uniform_shift: uniform, moved by `shift`. resolution_shift:
    logit_normal, moved by Qwen-Image's own rule: more noise for larger pictures."""
    shift: float | None = None
    """The s of sigma -> s * sigma / (1 + (s - 1) * sigma). Above 1 there is more noise. Only with sigma_sampling =
    "shift" or "uniform_shift"."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest sigma: what was drawn from 0 to 1 is scaled into this range. [0.02, 1.0] is what
    Qwen-Image's sampler ends with; [0.5, 1.0] trains on what decides the composition, [0.0, 0.5] on details."""
    loss_weighting: Literal["none", "bell"] = "none"
    """What the loss at a sigma is multiplied by. bell: exp(-2 (sigma - 0.5)^2) minus what that is at 0 and 1, times a
    constant that makes its mean 1; medium noise counts most, as in DiffSynth-Studio."""

    def problems(self) -> list[str]:
        found, (low, high) = list[str](), self.sigma_range
        if self.sigma_sampling in SHIFTED:
            if not (self.shift and self.shift > 0):
                found.append(f'shift must be above 0 with sigma_sampling = "{self.sigma_sampling}"')
        elif self.shift is not None:
            needs = '" or "'.join(SHIFTED)
            found.append(f'shift has no effect with sigma_sampling = "{self.sigma_sampling}"; it needs "{needs}"')
        if not 0 <= low < high <= 1:
            found.append(f"sigma_range must be two numbers that rise from at least 0 to at most 1, not {low}, {high}")
        return found


SHIFTED = ("shift", "uniform_shift")  # the values of `sigma_sampling` that need `shift`


def sample_sigmas(config: FlowConfig, count: int, num_image_tokens: int, random: torch.Generator) -> Tensor:
    """`count` sigmas, fp32, on the CPU."""
    if config.sigma_sampling.startswith("uniform"):
        return _moved(config, torch.rand(count, generator=random), num_image_tokens)
    return _moved(config, torch.sigmoid(torch.randn(count, generator=random)), num_image_tokens)


def loss_weights(config: FlowConfig, sigmas: Tensor, num_image_tokens: int) -> Tensor | None:
    """What the loss of a sample at each of `sigmas` is multiplied by, of the same shape; None where it is 1."""
    if config.loss_weighting == "none":
        return None
    return _bell(sigmas) / _bell_mean(config, num_image_tokens)


def _bell(sigmas: Tensor) -> Tensor:
    return torch.exp(-2 * (sigmas - 0.5).square()) - math.exp(-0.5)


@lru_cache
def _bell_mean(config: FlowConfig, num_image_tokens: int) -> float:
    """Over the sigmas that are drawn: at a thousand evenly spread probabilities."""
    base = stratified_sigmas(1000).double()
    if not config.sigma_sampling.startswith("uniform"):
        base = torch.sigmoid(torch.special.ndtri(base))
    return float(_bell(_moved(config, base, num_image_tokens)).mean())


def _moved(config: FlowConfig, sigmas: Tensor, num_image_tokens: int) -> Tensor:
    """Shifted as the configuration says, then scaled into its range."""
    if config.sigma_sampling in SHIFTED:
        assert config.shift is not None
        sigmas = shifted(sigmas, config.shift)
    elif config.sigma_sampling == "resolution_shift":
        sigmas = shifted(sigmas, math.exp(resolution_mu(num_image_tokens)))
    low, high = config.sigma_range
    return sigmas if (low, high) == (0, 1) else low + (high - low) * sigmas


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
