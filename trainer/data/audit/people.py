"""Faces, hands and people by MediaPipe's detectors, whose models lie in `models/`.

They are single-shot detectors in the way of BlazeFace (Bazarevsky et al., 2019): for each of a fixed set of anchors a
score, and box and points as offsets from the anchor's centre. A picture is seen as a whole, scaled to the model's small
square, so that faces of less than about a tenth of its longer side, and hands of less than a fifth, are not found.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.audit.boxes import Box, box_around

MODELS = Path(__file__).with_name("models")
OVERLAP = 0.3  # intersection over union from which two boxes are of the same thing
HAND = 0.5  # the score from which a palm has a hand's landmarks
HAND_REGION = 2.6  # a hand reaches over so many sides of its palm's box
_Array = NDArray[np.floating[Any]]


class _Detector(NamedTuple):
    """A model's input and anchors, as the graphs of mediapipe 0.10.21 have them."""

    file: str
    side: int
    darkest: int
    """Black in the input; white is 1."""
    strides: tuple[int, ...]
    """One for each layer of anchors."""
    anchors: int
    """How many a layer has in each cell."""
    score: float
    """From which something counts as found."""


FACE = _Detector("face_detection_full_range_sparse", 192, -1, (4,), 1, 0.65)
PALM = _Detector("palm_detection_full", 192, 0, (8, 16, 16, 16), 2, 0.5)
PERSON = _Detector("pose_detection", 224, -1, (8, 16, 32, 32, 32), 2, 0.6)


@dataclass(frozen=True)
class _Found:
    """Pixels of the picture."""

    score: float
    box: _Array
    """Left, top, right, bottom."""
    points: _Array


class PeopleFinder:
    """Not for several threads at once. ImportError without `ai-edge-litert`."""

    def __init__(self) -> None:
        from ai_edge_litert.interpreter import Interpreter  # an extra

        names = (FACE.file, PALM.file, PERSON.file, "hand_landmark_lite")
        self._models = {name: Interpreter(str(MODELS / f"{name}.tflite"), num_threads=1) for name in names}
        for model in self._models.values():
            model.allocate_tensors()

    def __call__(self, image: Image.Image) -> dict[str, list[Box]]:
        size = image.size
        faces = [box_around(found.box.reshape(2, 2), size, found.score) for found in self._detect(FACE, image)]
        people = [box_around(_body(found), size, found.score) for found in self._detect(PERSON, image)]
        return {"faces": faces, "hands": [*self._hands(image)], "people": people}

    def _run(self, name: str, pixels: _Array) -> list[_Array]:
        """The model's outputs."""
        model = self._models[name]
        model.set_tensor(model.get_input_details()[0]["index"], pixels[None])
        model.invoke()
        return [model.get_tensor(output["index"])[0] for output in model.get_output_details()]

    def _detect(self, detector: _Detector, image: Image.Image) -> list[_Found]:
        """What scores enough, the best of those that overlap."""
        scale = detector.side / max(image.size)
        width, height = (max(round(side * scale), 1) for side in image.size)
        margin = ((detector.side - width) // 2, (detector.side - height) // 2)
        square = Image.new("RGB", (detector.side, detector.side))
        square.paste(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2), margin)
        span = 1 - detector.darkest
        outputs = self._run(detector.file, np.asarray(square, np.float32) / 255 * span + detector.darkest)
        offsets, logits = sorted(outputs, key=lambda output: -output.shape[-1])
        scores = 1 / (1 + np.exp(-np.clip(logits[:, 0], -80, 80)))
        centres = anchors(detector)
        found = list[_Found]()
        for index in np.argsort(-scores)[: int((scores > detector.score).sum())]:
            pairs = offsets[index].reshape(-1, 2)
            here = centres[index] * detector.side - margin
            centre, half, points = (pairs[0] + here) / scale, pairs[1] / 2 / scale, (pairs[2:] + here) / scale
            box = np.concatenate([centre - half, centre + half])
            if all(_overlap(box, other.box) < OVERLAP for other in found):
                found.append(_Found(float(scores[index]), box, points))
        return found

    def _hands(self, image: Image.Image) -> Iterator[Box]:
        """Palms on which the landmarks of a hand are found, too: a palm alone is found in many a chin."""
        for palm in self._detect(PALM, image):
            along = palm.points[2] - palm.points[0]  # from the wrist to the root of the middle finger
            side = float((palm.box[2:] - palm.box[:2]).max())
            centre = (palm.box[:2] + palm.box[2:]) / 2 + along / max(np.hypot(*along), 1e-6) * side / 2
            angle, scale = math.atan2(along[0], -along[1]), HAND_REGION * side / 224
            turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            shift = centre - turn @ (112, 112)
            matrix = (*turn[0], shift[0], *turn[1], shift[1])
            region = image.transform((224, 224), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            landmarks, score, *_ = self._run("hand_landmark_lite", np.asarray(region, np.float32) / 255)
            if score[0] >= HAND:
                points = landmarks.reshape(-1, 3)[:, :2] @ turn.T + shift
                margin = 0.1 * (points.max(axis=0) - points.min(axis=0))  # landmarks lie inside the hand
                corners = np.stack([points.min(axis=0) - margin, points.max(axis=0) + margin])
                yield box_around(corners, image.size, score[0])


def anchors(detector: _Detector) -> _Array:
    """The centres of anchors, 0 to 1, in the order of the model's outputs: those of layers with the same stride are
    together for each cell."""
    found = []
    for stride in dict.fromkeys(detector.strides):
        cells = detector.side // stride
        rows, columns = np.mgrid[0:cells, 0:cells]
        centres = (np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5) / cells
        found.append(np.repeat(centres, detector.anchors * detector.strides.count(stride), axis=0))
    return np.concatenate(found).astype(np.float32)


def _body(found: _Found) -> _Array:
    """Two corners of the square around a person: point 0 lies between the hips, point 1 on a circle around the body."""
    hips, rim = found.points[:2]
    radius = np.hypot(*(rim - hips))
    return np.stack([hips - radius, hips + radius])


def _overlap(one: _Array, other: _Array) -> float:
    """Intersection over union."""
    corner = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None)
    common = float(corner.prod())
    areas = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()
    return common / max(float(areas) - common, 1e-6)
