"""What a picture is like, in numbers.

They are taken from its luminance, scaled down to at most WORKING x WORKING pixels, so that they say the same of a
picture of 1 or of 20 megapixels. Smaller pictures are measured as they are.
"""

import io
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.pictures import pixel_hash

WORKING = 512  # pixels of the square whose area a picture is scaled down to
BLOCK = 8  # pixels of the square that counts as flat or not
FLAT = 2 / 255  # standard deviation of luminance in a flat block: what JPEG leaves in an even wall
ROUNDING = 2 / 255  # differences between neighbours that soft gradients have in 8 bits
TILES = 4  # a picture has TILES x TILES parts, of which the sharpest counts
HASH_SIDE = 16  # a perceptual hash has HASH_SIDE**2 bits
THUMBNAIL = 256  # pixels of the longer side
_Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Measures:
    size: tuple[int, int]
    """Width and height, upright."""
    sharpness: float
    shadows: float
    lights: float
    contrast: float
    flat: float
    perceptual_hash: str
    pixels: str
    """sha256 of size and pixels."""


def measure(image: Image.Image) -> Measures:
    """All measures of an upright picture in RGB."""
    small = luminance(image)
    values = np.asarray(small, np.float32) / 255
    shadows, lights = (float(value) for value in np.percentile(values, (2, 98)))
    return Measures(
        size=image.size,
        sharpness=round(sharpness(values), 4),
        shadows=round(shadows, 4),
        lights=round(lights, 4),
        contrast=round((lights - shadows) / max(lights + shadows, 1e-6), 4),
        flat=round(flatness(values), 4),
        perceptual_hash=str(imagehash.phash(small, hash_size=HASH_SIDE)),
        pixels=pixel_hash(image),
    )


def luminance(image: Image.Image) -> Image.Image:
    """Y' of ITU-R BT.601, scaled down to the working size."""
    width, height = image.size
    scale = min(WORKING / (width * height) ** 0.5, 1)
    grey = image.convert("L")
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return grey if size == image.size else grey.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)


def sharpness(values: _Array) -> float:
    """1 - the blur effect of Crete et al., "The blur effect: perception and estimation with a new no-reference
    perceptual blur metric" (2007), of the sharpest part.

    In a sharp picture differences between neighbours shrink when it is blurred; in a blurred one they stay. With F the
    differences along an axis, and B those after a mean of 9 pixels along it, blur = 1 - sum(max(0, F - B)) / sum(F),
    the larger one of both axes. Two things are added. Parts are taken one by one, since a background may well be
    blurred; those with less than half of the mean detail say little, and are left out. And a sum(F) counts as no less
    than a quarter of the other axis': what was moved has hardly any detail along its way.
    """
    found: list[tuple[float, float]] = []
    for part in _tiles(values):
        sums = [_differences(part), _differences(part.T)]
        most = max(total for total, _ in sums)
        if most > 0:
            found.append((most / part.size, min(lost / max(total, most / 4) for total, lost in sums)))
    enough = sum(detail for detail, _ in found) / max(len(found), 1) / 2
    return max((sharp for detail, sharp in found if detail >= enough), default=0.0)


def _differences(values: _Array, width: int = 9) -> tuple[float, float]:
    """Sums of the differences between neighbours along the first axis that are more than rounding, and of how much a
    mean of `width` pixels takes from them."""
    padded = np.pad(values, ((width // 2 + 1, width // 2), (0, 0)), mode="edge")
    sums = np.cumsum(padded, axis=0, dtype=np.float64)
    blurred = (sums[width:] - sums[:-width]) / width
    before, after = np.abs(np.diff(values, axis=0)), np.abs(np.diff(blurred, axis=0))
    counts = before > ROUNDING
    return float(before[counts].sum()), float(np.maximum(before - after, 0)[counts].sum())


def _tiles(values: _Array) -> list[_Array]:
    return [part for row in np.array_split(values, TILES) for part in np.array_split(row, TILES, axis=1) if part.size]


def flatness(values: _Array) -> float:
    """The share of blocks of BLOCK x BLOCK pixels whose luminance has a standard deviation below FLAT."""
    height, width = (side // BLOCK * BLOCK for side in values.shape)
    if not height or not width:
        return float(values.std() < FLAT)
    blocks = values[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return float((blocks.std(axis=(1, 3)) < FLAT).mean())


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=75)
    return file.getvalue()
