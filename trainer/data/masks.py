"""Masks: what of a picture counts in the loss. White counts wholly, black by `[data] mask_outside`, grey between.

A mask is laid over the upright picture, as a viewer shows both, and goes the same way from there: bucket, resampling,
crop, and at last the cells of the latents.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.captions import same_name
from trainer.data.notes import Notes
from trainer.data.pictures import SUFFIXES, TRANSPARENT, DataError, decode, fitted, pixel_hash, read

ENDING = ".mask.png"  # of a mask beside its picture, which has the same name up to there
_OTHERS = re.compile(r"(.+?)(?:-masklabel|-condlabel|[-_.]mask)")  # of other programs


@dataclass(frozen=True)
class Mask:
    path: Path
    digest: str
    """sha256 of its size and values, in hex."""


# --- found by name ----------------------------------------------------------------------------------------


def beside(pictures: Sequence[Path]) -> set[Path]:
    """Those of a folder's pictures that are masks by their names: a.mask.png; a-masklabel.png or a_mask.png where there
    is an a.png (or .jpg, ...)."""
    stems = {path.stem for path in pictures}
    return {
        path for path in pictures if _is_ours(path) or ((match := _OTHERS.fullmatch(path.stem)) and match[1] in stems)
    }


def look_at_names(masks: Iterable[Path], pictures: Iterable[Path], problems: list[str], notes: Notes) -> None:
    """What is wrong with the names of masks beside the pictures of a folder."""
    names = {same_name(path.stem) for path in pictures}
    for path in sorted(masks):
        if not _is_ours(path):
            notes.add("masks beside pictures, which are not used; name them NAME.mask.png to use them", str(path))
        elif _partner(path) not in names:
            problems.append(_no_partner(path, path.parent))


def find(pictures: Sequence[Path], images: Path, folder: Path | None, problems: list[str]) -> dict[Path, Path]:
    """The masks of pictures that have one: beside them, or where they are under `images`, but under `folder`."""
    found, listed = dict[Path, Path](), cache(_listed)
    for picture in pictures:
        name, place = same_name(picture.stem), picture.parent.absolute()
        files = [path for path in listed(picture.parent).get(name, ()) if _is_ours(path)]
        if folder is not None and place.is_relative_to(images.absolute()):
            files += listed(folder / place.relative_to(images.absolute())).get(name, ())
        if len(files) > 1:
            problems.append(f"{picture}: has {len(files)} masks, {' and '.join(map(str, files))}; keep one of them")
        elif files:
            found[picture] = files[0]
    if folder is not None:
        problems += _alone(folder, images)
    return found


def _listed(folder: Path) -> dict[str, list[Path]]:
    """The files in a folder that may be masks, by the names of their pictures."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() == ".png" and not path.name.startswith("."):
            found.setdefault(_partner(path), []).append(path)
    return found


def _alone(folder: Path, images: Path) -> Iterator[str]:
    """A problem for each mask under `folder` without a picture at its place under `images`."""

    @cache
    def names(place: Path) -> set[str]:
        entries = place.iterdir() if place.is_dir() else ()
        return {same_name(path.stem) for path in entries if path.suffix.lower() in SUFFIXES and not _is_ours(path)}

    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        place = images / path.parent.relative_to(folder)
        if path.suffix.lower() != ".png":
            yield f"{path}: is no PNG; masks are NAME.png or NAME.mask.png"
        elif _partner(path) not in names(place):
            yield _no_partner(path, place)


def _is_ours(path: Path) -> bool:
    return path.name.lower().endswith(ENDING)


def _partner(mask: Path) -> str:
    """The name of its picture, without what makes it a mask, and without suffix."""
    return same_name(mask.name[: -len(ENDING)] if _is_ours(mask) else mask.stem)


def _no_partner(mask: Path, place: Path) -> str:
    return f"{mask}: is the mask of a picture {_partner(mask)}, and there is none in {place}; rename or remove it"


# --- read -------------------------------------------------------------------------------------------------


def inspect(path: Path, picture: Path, size: tuple[int, int], buckets: Iterable[tuple[int, int]]) -> Mask | DataError:
    """The mask of an upright picture of `size` that is trained at `buckets`, or what is wrong with it."""
    try:
        mask = _read(path)
    except DataError as error:
        return error
    if mask.size != size:
        here, there = ("{} x {}".format(*pair) for pair in (mask.size, size))
        lies = f"; it must lie as {picture.name} does in a viewer, which turns it" if mask.size == size[::-1] else ""
        return DataError([f"{path}: is {here} pixels, and its picture {picture.name} is {there}{lies}"])
    for width, height in buckets:
        if fitted(mask, (width, height)).getextrema()[1] == 0:
            cut = f" within the crop of its picture to {width} x {height}" if mask.getextrema()[1] else ""
            advice = "remove the picture, too" if cut else "make white what is to be learned, or remove the mask"
            return DataError([f"{path}: is all black{cut}, so that nothing would be learned; {advice}"])
    return Mask(path, pixel_hash(mask))


def load(mask: Mask, bucket: tuple[int, int]) -> Image.Image:
    """The mask at its picture's bucket. DataError if it has changed."""
    image = _read(mask.path)
    if pixel_hash(image) != mask.digest:
        raise DataError([f"{mask.path}: the mask has changed since the run began; start the run again"])
    return fitted(image, bucket)


def _read(path: Path) -> Image.Image:
    """In grey. DataError if it is no mask."""
    image, done = decode(path, read(path))
    if TRANSPARENT in done:
        raise DataError([f"{path}: is a mask with transparent parts; save it without, in white, grey and black"])
    red, green, blue = image.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():
        raise DataError([f"{path}: is a mask in colours; save it in white, grey and black"])
    return red


# --- weighed ----------------------------------------------------------------------------------------------


def weights(mask: Image.Image, cells: tuple[int, int], outside: float) -> Tensor:
    """1 1 h w in fp32 of mean 1: how much each of h x w latents counts. A latent's mask is the mean of its pixels."""
    height, width = cells
    values = torch.from_numpy(np.array(mask, np.float64)) / 255
    pooled = values.view(height, mask.height // height, width, mask.width // width).mean(dim=(1, 3))
    found = outside + (1 - outside) * pooled
    return (found / found.mean()).float()[None, None]
