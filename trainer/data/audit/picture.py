"""One picture of an audit, before it is judged."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from trainer.data.audit.boxes import Box
from trainer.data.audit.measures import Measures, measure, thumbnail
from trainer.data.audit.words import Caption
from trainer.data.pictures import DataError, decode, read

Find = Callable[[Image.Image], Mapping[str, list[Box]]]


@dataclass(frozen=True)
class Seen:
    """What its file holds."""

    sha256: str
    """The file's, in hex; "" if it could not be read."""
    problem: str = ""
    """Why it cannot be used; then there is nothing else."""
    measures: Measures | None = None
    done: tuple[str, ...] = ()
    """What training does to it: turned upright, laid over white, ..."""
    boxes: Mapping[str, list[Box]] = field(default_factory=dict)
    """Those of each kind that was looked for."""
    thumbnail: bytes = b""
    """A JPEG."""


@dataclass(frozen=True)
class Picture:
    file: str
    """Its path under the audited folder, with `/`."""
    seen: Seen
    bucket: tuple[int, int] | None
    """What it is trained at; None if it cannot be used."""
    enlargement: float
    cropped: float
    caption: Caption
    tokens: int | None
    """Those of the caption; None if there is none, or no base was given."""


def see(path: Path, find: Find) -> Seen:
    """Read and measure a picture."""
    digest = ""
    try:
        data = read(path)
        digest = hashlib.sha256(data).hexdigest()
        image, done = decode(path, data)
    except DataError as error:
        return Seen(digest, "; ".join(error.problems).removeprefix(f"{path}: "))
    return Seen(digest, "", measure(image), tuple(done), find(image), thumbnail(image))
