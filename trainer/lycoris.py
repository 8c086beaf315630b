"""LoHa and LoKr of PEFT: from their parts to low-rank factors, and from low-rank factors to parts to start from.

    LoHa    dW = scale * (w1_a w1_b) o (w2_a w2_b)      o elementwise
    LoKr    dW = scale * kron(w1, w2)                   w1 and w2 whole, or products w_a w_b

Of a LoHa of ranks r1 and r2, the r1 r2 products of a column of w1_a and one of w2_a are the columns of b, those of rows
the rows of a. With a second product of ones it is a LoRA: a start is exact. The singular values of a Kronecker product
are the products of its parts' singular values, and so are its singular vectors: the best approximation is found from
the small parts. The Kronecker product nearest to a given dW is a problem of rank one after the entries of dW are put in
another order (Van Loan, Pitsianis 1993). dW is never formed, but where a LoHa's r1 r2 are too many.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor
from torch.nn.functional import linear

from trainer.lowrank import RESOLUTION, LowRank, energy, ordered, truncate

ITERATIONS = 200
Shape = tuple[int, ...]
_ZERO = ("hada_w2_b", "lokr_w1", "lokr_w1_a")
"""The parts that PEFT starts at zero, so that dW is zero."""


class Forward:
    """The forward pass of a layer of PEFT. What is trained is in fp32, and lowered to the input's type here.

    PEFT would form dW, raise the whole input to fp32 for it, and draw a random number in each pass, by which the layer
    is left out once in 17 million. Here dW is formed only of a LoHa for which its low-rank factors would cost more.
    """

    def __init__(self, layer: Any, adapter_name: str):
        self._layer, self._name = layer, adapter_name

    def __call__(self, input: Tensor) -> Tensor:
        result: Tensor = self._layer.base_layer(input)
        if self._layer.disable_adapters:
            return result
        parts, scale = parts_of(self._layer, self._name), self._layer.scaling[self._name]
        if "hada_w1_a" not in parts:
            return result + scale * _times_kronecker(input, {part: x.to(input.dtype) for part, x in parts.items()})
        out_features, rank = parts["hada_w1_a"].shape
        if rank**2 * (input.shape[-1] + out_features) < input.shape[-1] * out_features:
            a, b = _hadamard_factors(*(LowRank(parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"]) for i in (1, 2)))
            return result + scale * linear(linear(input, a.to(input.dtype)), b.to(input.dtype))
        weight: Tensor = self._layer.get_delta_weight(self._name)
        return result + linear(input, weight.to(input.dtype))


def _times_kronecker(input: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """input times the transposed kron(w1, w2): w1 on the blocks of features, w2 inside them."""
    first, second = ([parts[name] for name in _names(stem) if name in parts] for stem in ("lokr_w1", "lokr_w2"))
    found = input.unflatten(-1, (first[-1].shape[1], second[-1].shape[1]))
    for matrix in reversed(second):
        found = found @ matrix.T
    for matrix in reversed(first):
        found = matrix @ found
    return found.flatten(-2)


def parts_of(layer: Any, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of PEFT's layer of a LoHa or LoKr by its names, "hada_w1_a" or "lokr_w1"."""
    stores = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    return {part: store[adapter_name] for part, store in stores.items() if adapter_name in store}


def num_parameters(kind: str, rank: int, size: tuple[int, int], factor: int) -> int:
    """How many numbers a layer of that size (in_features, out_features) has to be trained, by PEFT's rules; factor: of
    a LoKr, as `decompose_factor`."""
    if kind == "loha":
        return 2 * rank * sum(size)
    (first_in, second_in), (first_out, second_out) = (factorization(side, factor) for side in size)
    in_factors = rank < max(second_out, second_in) / 2
    return first_out * first_in + (rank * (second_out + second_in) if in_factors else second_out * second_in)


# --- to low-rank factors ------------------------------------------------------------------------------------


@torch.no_grad()
def factors(parts: Mapping[str, Tensor], scale: float, limit: int | None = None) -> tuple[LowRank, float]:
    """dW as low-rank factors in fp32, and the energy that the limit takes away.

    parts: by PEFT's names, "hada_w1_a" or "lokr_w1"; limit: the result has at most this rank, rows in the order of
    their singular values.
    """
    first, second = ([parts[name].double() for name in _names(stem) if name in parts] for stem in _stems(parts))
    if "hada_w1_a" not in parts:
        found, lost = _kronecker(_svd(first), _svd(second), limit)
    else:
        found, lost = _hadamard(_alive(LowRank(first[1], first[0])), _alive(LowRank(second[1], second[0]))), 0.0
        if limit is not None:
            found, kept = truncate(found, limit)
            lost = energy(found) * (1 - kept) / kept
    return LowRank(found.a.float(), (found.b * scale).float()), lost * scale**2


def _stems(parts: Mapping[str, object]) -> tuple[str, str]:
    kind = next(iter(parts))[:4]
    return f"{kind}_w1", f"{kind}_w2"


def _names(stem: str) -> tuple[str, ...]:
    """That of a whole matrix, or of the two whose product it is."""
    return stem, f"{stem}_a", f"{stem}_b"


def _alive(x: LowRank) -> LowRank:
    """Without what is zero in one of its halves: it is no part of dW."""
    alive = x.a.any(dim=1) & x.b.any(dim=0)
    return LowRank(x.a[alive], x.b[:, alive])


def _hadamard(first: LowRank, second: LowRank) -> LowRank:
    (a1, b1), (a2, b2) = first, second
    if len(a1) * len(a2) >= min(a1.shape[1], len(b1)):  # then dW is not larger than its factors
        whole = (b1 @ a1) * (b2 @ a2)
        eye = torch.eye(min(whole.shape), dtype=whole.dtype)
        return LowRank(whole, eye) if len(whole) == len(eye) else LowRank(eye, whole)
    return _hadamard_factors(first, second)


def _hadamard_factors(first: LowRank, second: LowRank) -> LowRank:
    (a1, b1), (a2, b2) = first, second
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


# --- from low-rank factors ----------------------------------------------------------------------------------


def default_start(shapes: Mapping[str, Shape], random: torch.Generator) -> dict[str, Tensor]:
    """PEFT's default start by the run's own random numbers: dW is zero. shapes: of the parts, by their names."""
    found = {}
    for part, shape in shapes.items():
        bound = 0.0 if part in _ZERO else 1 / math.sqrt(shape[1])  # `kaiming_uniform_` with a = sqrt(5)
        found[part] = torch.empty(shape).uniform_(-bound, bound, generator=random) if bound else torch.zeros(shape)
    return found


def loha_start(x: LowRank, scale: float, random: torch.Generator) -> dict[str, Tensor]:
    """The parts of a LoHa of which dW is that of `x`, exactly. x: at the rank of the LoHa.

    The second product is one in its first rank; its others are random and zero, so that they can learn.
    """
    rank, in_features = x.a.shape
    second_out, bound = torch.zeros(len(x.b), rank), 1 / math.sqrt(in_features)
    second_in = torch.empty(rank, in_features).uniform_(-bound, bound, generator=random)
    second_out[:, 0] = second_in[0] = 1
    return {"hada_w1_a": x.b / scale, "hada_w1_b": x.a, "hada_w2_a": second_out, "hada_w2_b": second_in}


@torch.no_grad()
def lokr_start(
    x: LowRank, shapes: Mapping[str, Shape], scale: float, random: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """The parts of the LoKr nearest to the dW of `x`, which is not zero, and the share of its energy that they keep,
    1 - |dW - dW of the parts|^2 / |dW|^2. shapes: of the parts, by their names.

    One whole matrix and then the other is the best beside the other, until the product is as large as it gets; one that
    the adapter has in factors is truncated to their rank each time.
    """
    ranks = {stem: shapes[f"{stem}_b"][0] if stem not in shapes else None for stem in _stems(shapes)}
    sides = [shapes[stem] if stem in shapes else (shapes[f"{stem}_a"][0], shapes[f"{stem}_b"][1]) for stem in ranks]
    (out_first, in_first), (out_second, in_second) = sides
    a = x.a.double().cpu().reshape(-1, in_first, in_second)  # r j l
    b = x.b.double().cpu().reshape(out_first, out_second, -1)  # i k r
    second = torch.einsum("ikr,rjl->kl", b, a)  # the sum over blocks: any start that is not orthogonal to the answer
    if not float(second.norm()):
        second = torch.ones(out_second, in_second, dtype=torch.float64)
    first, previous = torch.zeros(out_first, in_first, dtype=torch.float64), 0.0
    for _ in range(ITERATIONS):
        first = _truncated(_beside_second(b, a, second) / second.square().sum(), ranks["lokr_w1"])
        second = _truncated(_beside_first(b, a, first) / first.square().sum(), ranks["lokr_w2"])
        size = float(first.norm() * second.norm())
        if abs(size - previous) <= 1e-9 * size:
            break
        previous = size
    balance = math.sqrt(float(second.norm() / first.norm()))
    found = dict[str, Tensor]()
    for (stem, rank), value in zip(ranks.items(), (first * balance / scale, second / balance), strict=True):
        if rank is None:
            found[stem] = value.float()
        else:
            eye = torch.eye(value.shape[1], dtype=torch.float64)
            found[f"{stem}_b"], found[f"{stem}_a"] = ordered(LowRank(eye, value), rank, random)[0]
    return found, _share_kept(b, a, found, scale, energy(x))


def _beside_second(b: Tensor, a: Tensor, second: Tensor) -> Tensor:
    """sum over k and l of dW times `second`: i j. b: i k r; a: r j l."""
    return torch.einsum("ikr,krj->ij", b, torch.einsum("rjl,kl->krj", a, second))


def _beside_first(b: Tensor, a: Tensor, first: Tensor) -> Tensor:
    """sum over i and j of dW times `first`: k l."""
    return torch.einsum("jkr,rjl->kl", torch.einsum("ikr,ij->jkr", b, first), a)


def _truncated(value: Tensor, rank: int | None) -> Tensor:
    if rank is None:
        return value
    u, s, vh = torch.linalg.svd(value, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def _matrix(parts: Mapping[str, Tensor], stem: str) -> Tensor:
    """w1 or w2 of a LoKr, in float64."""
    if stem in parts:
        return parts[stem].double()
    return parts[f"{stem}_a"].double() @ parts[f"{stem}_b"].double()


def _share_kept(b: Tensor, a: Tensor, parts: Mapping[str, Tensor], scale: float, whole: float) -> float:
    """|dW - K|^2 = |dW|^2 - 2 <dW, K> + |K|^2, K being the product of the parts."""
    first, second = _matrix(parts, "lokr_w1") * scale, _matrix(parts, "lokr_w2")
    inner = float((_beside_second(b, a, second) * first).sum())
    left = whole - 2 * inner + float(first.norm() * second.norm()) ** 2
    return 1 - max(0.0, left) / whole


@torch.no_grad()
def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The relative difference of two LoKr's dW at the same scale, as `lowrank.relative_difference`."""
    (first, second), (others_first, others_second) = (
        [_matrix(parts, stem) for stem in ("lokr_w1", "lokr_w2")] for parts in (one, other)
    )
    size = float(first.norm() * second.norm())
    others_size = float(others_first.norm() * others_second.norm())
    if size == 0:
        return 0.0 if others_size == 0 else math.inf
    inner = float((first * others_first).sum() * (second * others_second).sum())
    return math.sqrt(max(0.0, size**2 - 2 * inner + others_size**2)) / size
