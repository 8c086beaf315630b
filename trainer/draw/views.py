"""The same subject from several sides: the words that ask for a view, and how alike the subject stays."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

VIEWS = {
    "front": ("front view", "正面视图"),
    "side": ("side view, in profile", "侧面视图"),
    "back": ("back view, seen from behind", "背面视图"),
    "left": ("seen from the left", "左侧视图"),
    "right": ("seen from the right", "右侧视图"),
    "three-quarter": ("three-quarter view", "四分之三侧面视图"),
    "top": ("seen from above", "俯视图"),
    "low": ("seen from below", "仰视图"),
}
"""The words in English and in Chinese: Qwen-Image reads both."""


def with_view(prompt: str, view: str) -> str:
    """The prompt that asks for a view; as it is for "" ."""
    return ", ".join([prompt, *VIEWS[view]]) if view else prompt


def alike(embeddings: Mapping[str, Tensor], groups: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """How alike pictures of one group are: encoder -> `mean` and `lowest` cosine of two pictures of the same group.

    embeddings: encoder -> N D. groups: numbers of pictures that show the same subject from different sides.
    """
    found = {}
    for encoder, rows in embeddings.items():
        rows = torch.nn.functional.normalize(rows.double(), dim=1)
        cosines = [float(rows[i] @ rows[j]) for group in groups for i, j in combinations(group, 2)]
        found[encoder] = {"mean": sum(cosines) / len(cosines), "lowest": min(cosines)}
    return found
