"""Where something is in a picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("faces", "hands", "people", "texts", "watermarks")
"""What is looked for."""


@dataclass(frozen=True)
class Box:
    """In pixels of the upright picture."""

    left: int
    top: int
    right: int
    bottom: int
    score: float
    """How sure the model is, 0 to 1."""
    text: str = ""
    """What is written there."""


def box_around(points: NDArray[np.floating[Any]], size: tuple[int, int], score: float, text: str = "") -> Box:
    """The smallest one around some points (n, 2), as far as it lies inside a picture of that size."""
    inside = np.clip(points, 0, size).round()
    left, top, right, bottom = (int(edge) for edge in (*inside.min(axis=0), *inside.max(axis=0)))
    return Box(left, top, right, bottom, round(float(score), 3), text)
