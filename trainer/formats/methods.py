"""LoHa and LoKr as low-rank factors: exact, or the best of a rank.

    LoHa    dW = scale * (w1_a w1_b) o (w2_a w2_b)      o elementwise
    LoKr    dW = scale * kron(w1, w2)                   w1 and w2 whole, or products w_a w_b

Of a LoHa of ranks r1 and r2, the r1 r2 products of a column of w1_a and one of w2_a are the columns of b, those of rows
the rows of a. The singular values of a Kronecker product are the products of its parts' singular values, and so are its
singular vectors: the best approximation is found from the small parts, and dW is never formed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.lowrank import RESOLUTION, LowRank, energy, truncate

Shape = tuple[int, ...]
NAMES = {"hada": "LoHa", "lokr": "LoKr"}
"""A method by the beginning of its parts' names."""


class Size(NamedTuple):
    """The size of a linear layer's dW, and what its rank is at most."""

    in_features: int
    out_features: int
    rank: int


def name_of(parts: Mapping[str, object]) -> str:
    """LoRA, where there are no other parts."""
    return NAMES[next(iter(parts))[:4]] if parts else "LoRA"


def problem(shapes: Mapping[str, Shape]) -> str | None:
    """What is wrong with the parts of one module, in words that follow its name; None if they fit together."""
    if len({part[:4] for part in shapes}) > 1:
        return f"is both LoHa and LoKr ({', '.join(sorted(shapes))})"
    kind = next(iter(shapes))[:4]
    for stem in (f"{kind}_w1", f"{kind}_w2"):
        a, b = f"{stem}_a", f"{stem}_b"
        own = sorted(part for part in shapes if part in (stem, a, b))
        if own not in ([stem], [a, b]):
            needed = f"{a} and {b}" if kind == "hada" else f"{stem}, or {a} and {b}"
            return f"has {' and '.join(own) or 'nothing'} where {needed} must be"
        if wrong := [part for part in own if len(shapes[part]) != 2 or 0 in shapes[part]]:
            return f"has {wrong[0]} of shape {shapes[wrong[0]]}: two dimensions are needed, as of a linear layer"
        if len(own) == 2 and shapes[a][1] != shapes[b][0]:
            return f"has rank {shapes[a][1]} in {a} and {shapes[b][0]} in {b}"
    first, second = _matrix(shapes, f"{kind}_w1"), _matrix(shapes, f"{kind}_w2")
    if kind == "hada" and first[:2] != second[:2]:
        return "has products of sizes {} -> {} and {} -> {}, which must be equal".format(*first[:2], *second[:2])
    return None


def size(shapes: Mapping[str, Shape]) -> Size:
    kind = next(iter(shapes))[:4]
    first, second = _matrix(shapes, f"{kind}_w1"), _matrix(shapes, f"{kind}_w2")
    if kind == "hada":
        return Size(*first[:2], min(first.rank * second.rank, *first[:2]))
    return Size(*(x * y for x, y in zip(first, second, strict=True)))


def _matrix(shapes: Mapping[str, Shape], stem: str) -> Size:
    if stem in shapes:
        out_features, in_features = shapes[stem]
        return Size(in_features, out_features, min(in_features, out_features))
    (out_features, between), (_, in_features) = shapes[f"{stem}_a"], shapes[f"{stem}_b"]
    return Size(in_features, out_features, min(in_features, out_features, between))


def divisor(shapes: Mapping[str, Shape]) -> int | None:
    """The rank that alpha is divided by; None for two whole matrices of a LoKr, which have scale 1."""
    for part in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):  # ComfyUI, too, takes that of w2 if both have one
        if part in shapes:
            return shapes[part][0]
    return None


@torch.no_grad()
def factors(parts: Mapping[str, Tensor], scale: float, limit: int | None = None) -> tuple[LowRank, float]:
    """dW as low-rank factors in fp32, and the energy that the limit takes away.

    limit: the result has at most this rank, rows in the order of their singular values.
    """
    kind = next(iter(parts))[:4]
    first, second = (
        [parts[name].double() for name in (stem, f"{stem}_a", f"{stem}_b") if name in parts]
        for stem in (f"{kind}_w1", f"{kind}_w2")
    )
    if kind == "lokr":
        found, lost = _kronecker(_svd(first), _svd(second), limit)
    else:
        found, lost = _hadamard(LowRank(first[1], first[0]), LowRank(second[1], second[0])), 0.0
        if limit is not None:
            found, kept = truncate(found, limit)
            lost = energy(found) * (1 - kept) / kept
    return LowRank(found.a.float(), (found.b * scale).float()), lost * scale**2


def _hadamard(first: LowRank, second: LowRank) -> LowRank:
    (a1, b1), (a2, b2) = first, second
    if len(a1) * len(a2) >= min(a1.shape[1], len(b1)):  # then dW is not larger than its factors
        whole = (b1 @ a1) * (b2 @ a2)
        eye = torch.eye(min(whole.shape), dtype=whole.dtype)
        return LowRank(whole, eye) if len(whole) == len(eye) else LowRank(eye, whole)
    return LowRank((a1[:, None] * a2).flatten(0, 1), (b1[:, :, None] * b2[:, None]).flatten(1))


class _Svd(NamedTuple):
    """u s vh: columns of u and rows of vh have length 1 and are orthogonal."""

    u: Tensor
    s: Tensor
    vh: Tensor


def _kronecker(first: _Svd, second: _Svd, limit: int | None) -> tuple[LowRank, float]:
    values, order = torch.outer(first.s, second.s).flatten().sort(descending=True)
    keep = min(int((values > values[0] * RESOLUTION).sum()), len(values) if limit is None else limit)
    i, j = order[:keep] // len(second.s), order[:keep] % len(second.s)
    root = values[:keep].sqrt()
    a = (first.vh[i][:, :, None] * second.vh[j][:, None]).flatten(1) * root[:, None]
    b = (first.u[:, None, i] * second.u[:, j]).flatten(0, 1) * root
    return LowRank(a, b), float(values[keep:].square().sum())


def _svd(parts: list[Tensor]) -> _Svd:
    """Singular values and vectors of a matrix, or of the product of two.

    u are the eigenvectors of m m^T, and s vh = u^T m: several times as fast as an SVD, and whatever the rounding of u,
    u s vh is m.
    """
    if len(parts) == 2:
        q, r = torch.linalg.qr(parts[0])
        u, s, vh = _svd([r @ parts[1]])
        return _Svd(q @ u, s, vh)
    (m,) = parts
    if len(m) > m.shape[1]:
        u, s, vh = _svd([m.T])
        return _Svd(vh.T, s, u.T)
    u = torch.linalg.eigh(m @ m.T).eigenvectors.flip(1)
    rows = u.T @ m
    s = rows.norm(dim=1)
    return _Svd(u, s, rows / s.clamp_min(torch.finfo(m.dtype).tiny)[:, None])
