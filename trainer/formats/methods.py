"""LoHa and LoKr in files: which parts a module needs, and what its alpha is divided by. See `trainer.lycoris`."""

from collections.abc import Mapping
from typing import NamedTuple

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
