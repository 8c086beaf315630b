"""LoHa and LoKr adapters of PEFT, started from low-rank factors.

LoHa: dW = scale * (w1_a w1_b) o (w2_a w2_b), o elementwise. With a second product of ones it is a LoRA: exact.
LoKr: dW = scale * kron(w1, w2). Its nearest to a given dW is a problem of rank one after the entries of dW are put in
another order (Van Loan, Pitsianis 1993); the report says what is lost.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer
from torch import Tensor, nn

from trainer.adapter import TOLERANCE, AdapterError, AdapterWeights
from trainer.flow import generator
from trainer.lowrank import LowRank, energy, energy_kept, norm, ordered, relative_difference

ITERATIONS = 200


def layers(transformer: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if isinstance(module, LoHaLayer | LoKrLayer) and adapter_name in module._available_adapters:
            yield name, module


@torch.no_grad()
def apply_seed(
    transformer: nn.Module, weights: AdapterWeights, *, random_seed: int, adapter_name: str
) -> dict[str, Any]:
    """Write effective factors into a LoHa or LoKr adapter, and verify it: the report says what became of them.

    `energy_kept` is 1 - |dW - dW of the adapter|^2 / |dW|^2, of all modules together and of the worst. AdapterError if
    a LoHa does not hold the truncated factors.
    """
    found = dict(layers(transformer, adapter_name))
    whole = dict(weights.factors)
    seeded = {name: factors for name, factors in whole.items() if name in found and norm(factors)}
    if whole and not seeded:
        raise AdapterError("the seed has none of the modules that this adapter has")
    lost: dict[str, float] = {}
    for name, factors in seeded.items():
        layer = found[name]
        if isinstance(layer, LoHaLayer):
            lost[name] = _write_loha(layer, factors, adapter_name, generator(random_seed, "adapter", name))
        else:
            lost[name] = _write_lokr(layer, factors, adapter_name)
    energies = {name: energy(factors) for name, factors in seeded.items()}
    return {
        "adapter": type(next(iter(found.values()))).__name__,
        "seeded": len(seeded),
        "random": len(found) - len(seeded),
        "dropped": sorted(whole.keys() - found.keys()),
        "energy_kept": energy_kept({name: 1 - share for name, share in lost.items()}, energies) if lost else None,
    }


def _write_loha(layer: Any, factors: LowRank, name: str, random: torch.Generator) -> float:
    """The second product is one in its first rank; its others are random and zero, so that they can learn."""
    ready, kept = ordered(LowRank(factors.a.cpu(), factors.b.cpu()), layer.r[name], random)
    first_out, first_in = layer.hada_w1_a[name], layer.hada_w1_b[name]
    second_out, second_in = layer.hada_w2_a[name], layer.hada_w2_b[name]
    first_out.copy_(ready.b / layer.scaling[name])
    first_in.copy_(ready.a)
    second_out.zero_()
    second_out[:, 0] = 1
    bound = 1 / math.sqrt(second_in.shape[1])
    second_in.copy_(torch.empty(second_in.shape).uniform_(-bound, bound, generator=random))
    second_in[0] = 1
    ones = (second_out.double() @ second_in.double() - 1).abs().max()
    arrived = LowRank(first_in.cpu(), first_out.cpu() * layer.scaling[name])
    if float(ones) or not relative_difference(ready, arrived) <= TOLERANCE:
        raise AdapterError("the seed is not in the LoHa: its dW differs from what was asked")
    return 1 - kept


def _write_lokr(layer: Any, factors: LowRank, name: str) -> float:
    """Both as full matrices, then as far as the adapter has them in factors, truncated to its rank."""
    (out_first, in_first), (out_second, in_second) = (_shape(layer, part, name) for part in ("w1", "w2"))
    a = factors.a.double().cpu().reshape(-1, in_first, in_second)  # r j l
    b = factors.b.double().cpu().reshape(out_first, out_second, -1)  # i k r
    ranks = {part: layer.r[name] if name not in getattr(layer, f"lokr_{part}") else None for part in ("w1", "w2")}
    second = torch.einsum("ikr,rjl->kl", b, a)  # the sum over blocks: any start that is not orthogonal to the answer
    if not float(second.norm()):
        second = torch.ones(out_second, in_second, dtype=torch.float64)
    first, previous = torch.zeros(out_first, in_first, dtype=torch.float64), 0.0
    for _ in range(ITERATIONS):
        first = _truncated(torch.einsum("ikr,rjl,kl->ij", b, a, second) / second.square().sum(), ranks["w1"])
        second = _truncated(torch.einsum("ikr,rjl,ij->kl", b, a, first) / first.square().sum(), ranks["w2"])
        size = float(first.norm() * second.norm())
        if abs(size - previous) <= 1e-9 * size:
            break
        previous = size
    balance = math.sqrt(float(second.norm() / first.norm()))
    first, second = first * balance / layer.scaling[name], second / balance
    for part, value in (("w1", first), ("w2", second)):
        rank = ranks[part]
        if rank is None:
            getattr(layer, f"lokr_{part}")[name].copy_(value)
        else:
            u, s, vh = torch.linalg.svd(value, full_matrices=False)
            root = s[:rank].sqrt()
            getattr(layer, f"lokr_{part}_a")[name].copy_(u[:, :rank] * root)
            getattr(layer, f"lokr_{part}_b")[name].copy_(root[:, None] * vh[:rank])
    # |dW - K|^2 = |dW|^2 - 2 <dW, K> + |K|^2
    scale = layer.scaling[name]
    inner = float(torch.einsum("ikr,rjl,ij,kl->", b, a, first, second)) * scale
    whole = energy(factors)
    return max(0.0, whole - 2 * inner + float(first.norm() * second.norm() * scale) ** 2) / whole


def _shape(layer: Any, part: str, name: str) -> tuple[int, int]:
    whole: Mapping[str, Tensor] = getattr(layer, f"lokr_{part}")
    if name in whole:
        return tuple(whole[name].shape)  # type: ignore[return-value]
    return getattr(layer, f"lokr_{part}_a")[name].shape[0], getattr(layer, f"lokr_{part}_b")[name].shape[1]


def _truncated(value: Tensor, rank: int | None) -> Tensor:
    if rank is None:
        return value
    u, s, vh = torch.linalg.svd(value, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
