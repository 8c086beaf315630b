"""Samples and real pictures, small enough to lie in a page."""

import base64
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from trainer import validation
from trainer.data.folders import folder_path
from trainer.data.pictures import DataError, open_picture
from trainer.files import content_hash
from trainer.page.left import Key, Left, entries, table_at

MAX_STEPS = 12
SIDES = {48: 512, 120: 384, 10**9: 256}
"""Up to how many samples there are at which size, so that the page stays below some MB."""
MAX_REAL = {"held_out": 6, "train": 12}
REAL_SIDE, THUMBNAIL_SIDE = 256, 96
QUALITY = 82  # of JPEG
SMALL = 128  # up to here a picture stays a PNG: JPEG would blur what is enlarged


@dataclass(frozen=True)
class Shown:
    """A picture as it lies in the page."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Row:
    """The samples of a prompt, over the steps of the slider; None where there is none, or it is damaged."""

    prompt: str
    seed: str
    cells: list[Shown | None]


@dataclass(frozen=True)
class Real:
    picture: str
    part: str
    caption: str
    shown: Shown


def shrunk(path: Path, side: int) -> Shown | None:
    """At most `side` pixels wide and high; None if it cannot be used."""
    with suppress(OSError):
        return _shrunk(path, side, path.stat().st_mtime_ns)
    return None


@lru_cache(maxsize=1024)
def _shrunk(path: Path, side: int, changed: int) -> Shown | None:
    """Kept, since a run makes its page at each validation."""
    picture = _read(path, changed) if side <= REAL_SIDE else _open(path, side)
    if picture is None:
        return None
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    data, kind = io.BytesIO(), "png" if max(picture.size) <= SMALL and side > SMALL else "jpeg"
    picture.save(data, kind, **({"quality": QUALITY} if kind == "jpeg" else {}))
    return Shown(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", *picture.size)


@lru_cache(maxsize=512)
def _read(path: Path, changed: int) -> Image.Image | None:
    """At most REAL_SIDE: a photograph takes long to read, and is shown at two sizes."""
    return _open(path, REAL_SIDE)


def _open(path: Path, side: int) -> Image.Image | None:
    try:
        picture = open_picture(path)
    except DataError:
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def samples(left: Left) -> tuple[list[int], list[Row]]:
    """At most MAX_STEPS steps: the first, the last and those between, among them the chosen one; and a row for each
    prompt."""
    folder = left.folder / "samples"
    try:
        files, rows = validation.sample_files(folder), validation.sample_rows(folder)
    except (ValueError, IndexError, OSError):  # names that are not ours
        return [], []
    steps = spread([*files], MAX_STEPS, left.chosen)
    side = next(size for count, size in SIDES.items() if len(steps) * len(rows) <= count)
    found = []
    for row, (prompt, seed) in rows.items():
        cells = [shrunk(folder / f"step-{step:06d}-{row}.png", side) for step in steps]
        if any(cells):
            found.append(Row(prompt, seed, cells))
    return (steps, found) if found else ([], [])


def spread(steps: list[int], limit: int, wanted: int | None) -> list[int]:
    """At most `limit` of the steps: the first, the last, others evenly between, and the wanted one if it is there."""
    if len(steps) <= limit:
        return steps
    places = [round(i * (len(steps) - 1) / (limit - 1)) for i in range(limit)]
    if wanted in steps and (place := steps.index(wanted)) not in places:
        nearest = min(range(1, limit - 1), key=lambda i: abs(places[i] - place))
        places[nearest] = place
    return [steps[place] for place in places]


@dataclass(frozen=True)
class Album:
    """The run's pictures that are still where they were, with the content that they had. They are read when they are
    asked for."""

    paths: Mapping[str, list[Path]]
    """Files by their names."""
    hashes: Mapping[Key, Any]
    """The sha256 of each picture of run.json."""

    def shown(self, key: Key, side: int) -> Shown | None:
        for path in self.paths.get(PurePath(key[1]).name, ()):
            with suppress(OSError):
                if content_hash(path) == self.hashes.get(key):
                    return shrunk(path, side)
        return None

    def thumbnail(self, key: Key) -> Shown | None:
        return self.shown(key, THUMBNAIL_SIDE)


def album(left: Left) -> Album:
    data = table_at(left.report, "config", "data")
    named = [data.get("images"), *(entry.get("images") for entry in entries(data.get("folders"))), data.get("held_out")]
    paths: dict[str, list[Path]] = {}
    for name in named:
        if isinstance(name, str) and name:
            with suppress(OSError):
                folder = folder_path(name)
                for path in sorted(folder.rglob("*") if data.get("recursive") else folder.iterdir()):
                    paths.setdefault(path.name, []).append(path)
    return Album(paths, {key: entry.get("sha256") for key, entry in left.pictures()})


def real(left: Left, album: Album) -> list[Real]:
    """Some of the held-out pictures and of the training ones, to hold samples against."""
    found = []
    for part, most in MAX_REAL.items():
        own = [(key, entry) for key, entry in left.pictures() if key[0] == part]
        for index in spread([*range(len(own))], most, None):
            key, entry = own[index]
            if shown := album.shown(key, REAL_SIDE):
                found.append(Real(key[1], part, caption(entry), shown))
    return found


def caption(entry: Mapping[str, Any]) -> str:
    """A picture's, or its captions."""
    found = entry.get("caption") or ""
    return " / ".join(map(str, found)) if isinstance(found, list) else str(found)
