"""Masks made of the boxes that an audit has found, for `[data] masks`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.config import first_few
from trainer.data.audit.boxes import Box
from trainer.data.audit.picture import Picture
from trainer.validation import write_png

BOXES = {"faces": "faces", "hands": "hands", "subject": "people"}
"""What can be asked for, and the kind of box that it is made of."""
FOLDER = "masks"  # in the output
# Sides of a shape in those of its box: white up to the first, from there on darker, black from the second. Boxes of
# faces and hands are tight, and an ellipse inside one would cut corners off; the square around a person is wide.
_ELLIPSE, _SQUARE = (1.25, 1.75), (1.0, 1.1)


def write_masks(folder: Path, pictures: Sequence[Picture], wanted: Sequence[str]) -> Iterator[str]:
    """`folder/NAME.png` for each picture in which something of what is wanted was found. Yields notes on the others."""
    without: dict[str, list[str]] = {}
    written: dict[PurePosixPath, str] = {}
    for picture in pictures:
        if picture.seen.measures is None:
            continue
        missing = [what for what in wanted if not picture.seen.boxes.get(BOXES[what])]
        name = PurePosixPath(picture.file).with_suffix(".png")
        if len(missing) == len(wanted):
            without.setdefault("no mask, since nothing of it was found", []).append(picture.file)
        elif name in written:
            yield f"no mask of {picture.file}: it would have the name of that of {written[name]}; rename one of them"
        else:
            written[name] = picture.file
            write_png(folder / name, draw(picture.seen.measures.size, picture.seen.boxes, wanted))
            for what in missing:
                without.setdefault(f"a mask without {what}, since no {BOXES[what]} were found", []).append(picture.file)
    yield f"masks of {len(written)} pictures are in {folder}; look at them before you train with them"
    for what, files in without.items():
        yield f"{what} ({len(files)}): {first_few(files)}"


def draw(size: tuple[int, int], boxes: Mapping[str, Sequence[Box]], wanted: Sequence[str]) -> Image.Image:
    """White where something of what is wanted is, with soft edges, and black elsewhere."""
    width, height = size
    values = np.zeros((height, width), np.float32)
    for what in wanted:
        for box in boxes.get(BOXES[what], ()):
            _lay(values, box, square=what == "subject")
    return Image.fromarray((255 * values).round().astype(np.uint8))


def _lay(values: NDArray[np.float32], box: Box, *, square: bool) -> None:
    """The shape of one box over what is there."""
    full, gone = _SQUARE if square else _ELLIPSE
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    half_width, half_height = (max(box.right - box.left, 1) / 2, max(box.bottom - box.top, 1) / 2)
    left, top = (max(round(at - gone * half), 0) for at, half in ((x, half_width), (y, half_height)))
    part = values[top : round(y + gone * half_height) + 1, left : round(x + gone * half_width) + 1]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    across, down = np.abs(columns + left + 0.5 - x) / half_width, np.abs(rows + top + 0.5 - y) / half_height
    distance = np.maximum(across, down) if square else np.hypot(across, down)
    np.maximum(part, np.clip((gone - distance) / (gone - full), 0, 1), out=part, casting="same_kind")
