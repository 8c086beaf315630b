"""Faces, hands, people, text and watermarks in pictures, as far as the extra `audit` is installed."""

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.audit.boxes import Box, box_around
from trainer.data.audit.people import PeopleFinder

EXTRA = 'pip install -e ".[audit]"'
TEXT_SIDE = 1600  # pixels of the longer side at which text is looked for
TEXT_SCORE = 0.8
MIN_LETTERS = 3  # fewer are seen in eyes and wheels, too
REPEATED = 3  # a line that is there so often is a watermark
_WATERMARK = re.compile(
    r"©|\(c\)|copyright|https?:|www\.|\.(com|net|org|cn|jp|ru)\b|^@\w|shutterstock|getty ?images|istock|alamy|"
    r"dreamstime|depositphotos|adobe ?stock|123rf|pixiv|deviantart|artstation|watermark|水印|版权",
    re.IGNORECASE,
)


class Finder:
    """What can be looked for here, for several threads: each has models of its own."""

    def __init__(self) -> None:
        missing = not_looked_for()
        self._kinds = [finder for what, (_, finder) in _FINDERS.items() if what not in missing]
        self._own = threading.local()

    def __call__(self, image: Image.Image) -> dict[str, list[Box]]:
        """The boxes of each kind; a kind that cannot be looked for is not there."""
        if not hasattr(self._own, "finders"):
            self._own.finders = [kind() for kind in self._kinds]
        return {name: boxes for finder in self._own.finders for name, boxes in finder(image).items()}


class TextFinder:
    """Lines of text, by PP-OCR's models, which the package `rapidocr` carries."""

    def __init__(self) -> None:
        from rapidocr import RapidOCR  # an extra

        engine = {f"EngineConfig.onnxruntime.{name}_op_num_threads": 1 for name in ("intra", "inter")}
        self._read = RapidOCR(params={"Global.log_level": "critical", **engine})

    def __call__(self, image: Image.Image) -> dict[str, list[Box]]:
        small = image.copy()
        small.thumbnail((TEXT_SIDE, TEXT_SIDE))
        found: Any = self._read(np.asarray(small)[:, :, ::-1], use_cls=False)
        if found.boxes is None:
            return {"texts": [], "watermarks": []}
        scale = image.width / small.width
        lines = [
            box_around(corners * scale, image.size, score, text)
            for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
            if score >= TEXT_SCORE and sum(letter.isalnum() for letter in text) >= MIN_LETTERS
        ]
        marks = watermarks(lines)
        return {"texts": [line for line in lines if line not in marks], "watermarks": marks}


FACES_HANDS_PEOPLE = "faces, hands and people"
_FINDERS = {
    FACES_HANDS_PEOPLE: (("ai_edge_litert",), PeopleFinder),
    "text and watermarks": (("rapidocr", "onnxruntime"), TextFinder),
}


def not_looked_for() -> list[str]:
    """What the extra would add here."""
    absent = {name for names, _ in _FINDERS.values() for name in names if importlib.util.find_spec(name) is None}
    return [what for what, (names, _) in _FINDERS.items() if absent.intersection(names)]


def watermarks(lines: Sequence[Box]) -> list[Box]:
    """Lines that are addresses, copyrights or names of agencies, or that are there again and again."""
    counts = Counter(line.text.casefold() for line in lines)
    return [line for line in lines if _WATERMARK.search(line.text) or counts[line.text.casefold()] >= REPEATED]
