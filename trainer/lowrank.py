"""Rank arithmetic on LoRA factors: concatenate, truncate exactly, pad, compare. dW = b a is never formed; only
`nearest` starts from a dW that is there.

A layer of Qwen-Image can have 57 million weights and there are hundreds of them; its factors have a hundredth of that.
Everything is computed in float64 and returned in fp32, on the device of the factors.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 1e-7
"""Singular values below this share of the largest are lost in fp32's rounding of dW: they count as zero."""


class LowRank(NamedTuple):
    """dW = b a, at scale 1."""

    a: Tensor
    """rank, in_features"""
    b: Tensor
    """out_features, rank"""


def rank(x: LowRank) -> int:
    return x.a.shape[0]


def zeros(in_features: int, out_features: int) -> LowRank:
    """dW = 0, of rank 0."""
    return LowRank(torch.zeros(0, in_features), torch.zeros(out_features, 0))


def concatenate(parts: Sequence[LowRank]) -> LowRank:
    """The sum of the parts' dW; its rank is the sum of their ranks."""
    return LowRank(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))


def scale(x: LowRank, factor: float) -> LowRank:
    """dW times `factor`, all of it in b."""
    return LowRank(x.a, x.b * factor)


@torch.no_grad()
def truncate(x: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best approximation of dW of at most `rank` (Eckart, Young 1936), and the share of energy it keeps.

    With a = L_a Q_a^T and b = Q_b L_b^T, both Q orthonormal, dW = Q_b (L_b^T L_a) Q_a^T: its singular values are those
    of the small core U S V^T, and its singular vectors b L_a V / S and a^T L_b U / S, without a Q. Singular values are
    split evenly over a and b, largest first. Directions below `RESOLUTION` are left out, because both of their halves
    would be almost zero and never learn: the result may have less than `rank`; `pad` fills it up. Energy is the sum
    of squared singular values, kept / all; 1.0 if dW is zero.
    """
    a, b = x.a.double(), x.b.double()
    l_a, l_b = _root(a), _root(b.T)
    u, s, vh = torch.linalg.svd(l_b.T @ l_a, full_matrices=False)
    total = float(s.square().sum())
    if total == 0:
        return LowRank(x.a[:0].float(), x.b[:, :0].float()), 1.0
    keep = min(rank, int((s > s[0] * RESOLUTION).sum()))
    root = s[:keep].sqrt()
    a = (l_b @ u[:, :keep] / root).T @ a
    b = b @ (l_a @ vh[:keep].T / root)
    return LowRank(a.float(), b.float()), float(s[:keep].square().sum()) / total


def _root(x: Tensor) -> Tensor:
    """L with L L^T = x x^T and as many rows; x: rank n in float64.

    From the Gram matrix of the rows at length 1, G: several times as fast as QR. Rounding changes G by about
    rank eps |G|, hence L, and with it each singular value, by this / min eigenvalue of G in relative terms. Where that
    could be more than `RESOLUTION`, as with rows that nearly depend on one another, L is from QR.
    """
    gram = x @ x.T
    lengths = gram.diagonal().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
    limit = len(x) * torch.finfo(x.dtype).eps / RESOLUTION
    if bool((values > limit * values[-1:]).all()):
        return lengths[:, None] * vectors * values.sqrt()
    return torch.linalg.qr(x.T, mode="r").R.T


@torch.no_grad()
def singular_values(x: LowRank) -> Tensor:
    """The singular values of dW, largest first, in float64: as many as the rank."""
    return torch.linalg.svdvals(_root(x.b.double().T).T @ _root(x.a.double()))


@torch.no_grad()
def with_random_directions(x: LowRank, generator: torch.Generator) -> LowRank:
    """Another dW with the same singular values, its singular vectors drawn uniformly from all orthonormal ones."""
    values = singular_values(x).cpu()
    a, b = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q * values.sqrt()
        for size in (x.a.shape[1], x.b.shape[0])
    )
    return LowRank(a.T.float().to(x.a), b.float().to(x.b))


def ranks_for_energy(parts: Iterable[tuple[str, LowRank]], energy: float) -> tuple[int, dict[str, int]]:
    """The smallest rank, the same for all, at which they together keep this share of their energy; and for each the
    smallest at which it alone does. At least 1."""
    squares = {name: singular_values(x).square() for name, x in parts}
    return common_rank(squares.values(), energy), {name: _smallest(own.cpu(), energy) for name, own in squares.items()}


def common_rank(squares: Iterable[Tensor], energy: float) -> int:
    """The smallest rank, the same for all matrices, at which they together keep this share of their energy. At least 1.

    squares: the squared singular values of each, largest first, in float64.
    """
    each = [own.cpu() for own in squares]
    together = torch.zeros(max(map(len, each)), dtype=torch.float64)
    for own in each:
        together[: len(own)] += own
    return _smallest(together, energy)


def _smallest(squares: Tensor, energy: float) -> int:
    kept = squares.cumsum(0)
    return max(1, int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1) if len(kept) and kept[-1] > 0 else 1


@torch.no_grad()
def nearest(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best approximation of a whole dW of at most `rank` (Eckart, Young 1936), and the share of energy it keeps.

    change: dW, out_features in_features, in float64. Its left or right singular vectors, whichever are shorter, are the
    eigenvectors of a Gram matrix, and the others what dW makes of them: several times as fast as an SVD. The rounding
    of the Gram matrix is 1e-16 of the largest singular value squared, so what it may mistake is below `RESOLUTION`.
    """
    if len(change) > change.shape[1]:
        (a, b), kept = nearest(change.T, rank)
        return LowRank(b.T.contiguous(), a.T.contiguous()), kept
    total = float(change.square().sum())
    if total == 0:
        return zeros(change.shape[1], len(change)), 1.0
    vectors = torch.linalg.eigh(change @ change.T).eigenvectors[:, -min(rank, len(change)) :].flip(1)
    rows = vectors.T @ change
    values = rows.norm(dim=1)
    alive = values > values[0] * RESOLUTION
    root = values[alive].sqrt()
    found = LowRank((rows[alive] / root[:, None]).float(), (vectors[:, alive] * root).float())
    return found, min(float(values[alive].square().sum()) / total, 1.0)


@torch.no_grad()
def squared_singular_values(change: Tensor) -> Tensor:
    """Those of a whole dW, in float64, largest first; change: as `nearest` takes it."""
    if not change.any():
        return change.new_zeros(1)
    gram = change @ change.T if len(change) <= change.shape[1] else change.T @ change
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def pad(x: LowRank, rank: int, generator: torch.Generator) -> LowRank:
    """Fill up to `rank` without changing dW: new rows of a are random, new columns of b zero.

    Were both zero, neither would ever get a gradient. The rows follow the law of nn.Linear, which is PEFT's too:
    uniform within 1 / sqrt(in_features) (`kaiming_uniform_` with a = sqrt(5)).
    """
    missing = rank - x.a.shape[0]
    assert missing >= 0, "truncate before padding"
    rows = torch.empty(missing, x.a.shape[1])
    if missing:
        bound = 1 / math.sqrt(x.a.shape[1])
        rows.uniform_(-bound, bound, generator=generator)
    return concatenate([x, LowRank(rows.to(x.a), x.b.new_zeros(x.b.shape[0], missing))])


def ordered(x: LowRank, rank: int, generator: torch.Generator) -> tuple[LowRank, float]:
    """At exactly `rank`: truncated, rows in the order of their singular values, filled up by `pad`; and the share of
    energy kept. What reads only the leading rows then reads the best of them."""
    short, kept = truncate(x, rank)
    return pad(short, rank, generator), kept


@torch.no_grad()
def norm(x: LowRank) -> float:
    """Frobenius norm of dW: its square is tr((b^T b) (a a^T))."""
    a, b = x.a.double(), x.b.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def energy(x: LowRank) -> float:
    """|dW|^2, the squared Frobenius norm: the sum of the squared singular values."""
    return norm(x) ** 2


def energy_kept(shares: Mapping[str, float], energies: Mapping[str, float]) -> dict[str, float]:
    """What is left of several layers' energy, as shares from 0 to 1: `total` of all together, `min` of the worst layer.

    shares: what each layer keeps; energies: what it had, which may be 0.
    """
    whole = sum(energies[name] for name in shares)
    kept = sum(shares[name] * energies[name] for name in shares)
    return {"total": kept / whole if whole else 1.0, "min": min(shares.values(), default=1.0)}


def relative_difference(x: LowRank, y: LowRank) -> float:
    """|dW_x - dW_y| / |dW_x|; 0 if both are zero, infinity if only x is. Resolves about 1e-8, the root of float64's."""
    size = norm(x)
    if size == 0:
        return 0.0 if norm(y) == 0 else math.inf
    return norm(concatenate([x, scale(y, -1.0)])) / size
