"""Numbers of an evaluation: means with their standard errors, PSNR and SSIM of pairs of pictures, and distances between
two sets of embeddings. Pure functions of tensors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BEST_PSNR = 100.0
"""dB. Equal pictures have infinitely many; 8 bits can tell differences up to 96."""


@dataclass(frozen=True)
class Value:
    """A number, and how well it is known."""

    value: float
    error: float | None
    """Its standard error; None where it is not known."""
    count: int
    """How many pictures, samples or prompts it is the mean over."""


def mean(values: Tensor) -> Value:
    """The mean of N values, and its standard error, which needs two."""
    values, count = values.double(), values.numel()
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return Value(float(values.mean()), error, count)


def psnr(drawn: Tensor, real: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each pair of pictures, in dB: N. Both N 3 H W in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # an extra

    found = peak_signal_noise_ratio(drawn, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=BEST_PSNR)


def ssim(drawn: Tensor, real: Tensor) -> Tensor:
    """The structural similarity of each pair of pictures, 1 for equal ones: N. Both N 3 H W in [0, 1], at least 11
    pixels wide and high.

    Gaussian windows of sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004); at the border they see the picture mirrored,
    where scikit-image leaves the border out.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(drawn, real, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.reshape(-1)


def frechet(x: Tensor, y: Tensor) -> float:
    """The squared Fréchet distance of two normal distributions with the means and covariances of the rows of x (N D)
    and y (M D), at least two each: |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) (Heusel et al. 2017).

    The trace of the root is the sum of the singular values of X Y^T, of centred rows divided by the roots of N - 1 and
    M - 1. This N x M matrix gives it exactly, also where covariances are singular, which they are for N <= D. There the
    distance is biased upwards.
    """
    x, y = x.double(), y.double()
    between = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((rows - rows.mean(0)) / math.sqrt(len(rows) - 1) for rows in (x, y))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return max(float(between + x.square().sum() + y.square().sum() - 2 * root), 0.0)


def kernel_distance(x: Tensor, y: Tensor) -> Value:
    """The squared maximum mean discrepancy of the rows of x (N D) and y (M D), at least two each, by the kernel
    (x.y / D + 1)^3, as KID has it (Bińkowski et al. 2018): unbiased, so that it is below 0 half of the time where both
    sets are drawn alike.

    Its standard error is the jackknife's (Efron and Stein 1981): each row is left out once. It needs three in each.
    """
    x, y, dim = x.double(), y.double(), x.shape[1]
    within_x, within_y, between = (((a @ b.T) / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x.fill_diagonal_(0)
    within_y.fill_diagonal_(0)
    value = _unbiased(within_x) + _unbiased(within_y) - 2 * between.mean()
    without_x = _unbiased_without(within_x) + _unbiased(within_y) - 2 * _mean_without(between)
    without_y = _unbiased_without(within_y) + _unbiased(within_x) - 2 * _mean_without(between.T)
    few = min(len(x), len(y)) < 3
    error = None if few else math.sqrt(_jackknife_variance(without_x) + _jackknife_variance(without_y))
    return Value(float(value), error, len(x))


def _unbiased(within: Tensor) -> Tensor:
    """The mean of a kernel matrix without its diagonal, which is 0."""
    return within.sum() / (len(within) * (len(within) - 1))


def _unbiased_without(within: Tensor) -> Tensor:
    """The same with each row, and its column, left out: N"""
    count = len(within) - 1
    return (within.sum() - 2 * within.sum(1)) / (count * (count - 1))


def _mean_without(between: Tensor) -> Tensor:
    """The mean of N x M values with each of the N rows left out: N"""
    return (between.sum() - between.sum(1)) / ((len(between) - 1) * between.shape[1])


def _jackknife_variance(values: Tensor) -> float:
    """values: N, each of a statistic without one of N"""
    return float((values - values.mean()).square().sum() * (len(values) - 1) / len(values))
