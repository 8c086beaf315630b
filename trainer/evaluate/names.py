"""Short names for LoRA files and folders of pictures that stand beside each other."""

from collections.abc import Sequence
from pathlib import Path


def distinct(paths: Sequence[Path], endings: Sequence[str] = ()) -> list[str]:
    """A name for each path, all of them different: as many of its last parts as are needed to tell them apart, without
    .safetensors, then its ending; of a path and ending that are there twice with a number after it."""
    parts = [path.absolute().with_suffix("" if path.suffix == ".safetensors" else path.suffix).parts for path in paths]
    endings = endings or [""] * len(paths)
    depth = next(
        (d for d in range(1, max(map(len, parts), default=1)) if len({p[-d:] for p in parts}) == len({*parts})), 1
    )
    found = list[str]()
    for own, ending in zip(parts, endings, strict=True):
        name, number = "/".join(own[-depth:]) + ending, 1
        unique = name
        while unique in found:
            number += 1
            unique = f"{name} ({number})"
        found.append(unique)
    return found
