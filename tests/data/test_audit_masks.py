"""Masks that an audit makes of its boxes: where they are white, for what, and in which way training reads them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.made import noise
from tests.helpers import BAD_INPUT, FINISHED, files
from trainer.data.__main__ import main
from trainer.data.audit import masks, run
from trainer.data.audit.boxes import Box
from trainer.data.dataset import DataConfig, scan

FACE, HAND, PERSON = Box(40, 60, 80, 120, 0.9), Box(150, 10, 190, 40, 0.9), Box(20, 40, 140, 200, 0.9)
FOUND: dict[int, dict[str, list[Box]]] = {
    200: {"faces": [FACE], "hands": [HAND], "people": [PERSON]},
    210: {"faces": [FACE], "hands": [], "people": []},
    220: {"faces": [], "hands": [], "people": []},
}
"""What is found in a picture, by its width."""


def looks(image: Image.Image) -> Mapping[str, list[Box]]:
    return FOUND[image.width]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "Finder", lambda: looks)
    monkeypatch.setattr(run, "not_looked_for", lambda: ["text and watermarks"])
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, width in (("all.jpg", 200), ("face.png", 210), ("deep/all.png", 200), ("nobody.png", 220)):
        noise(width, 240, seed=width + len(name)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def audit(pictures: Path, *arguments: str) -> int:
    output = pictures.parent / "audit"
    return main(["audit", str(pictures), "--output", str(output), "--set", "data.recursive=true", *arguments])


def test_masks_are_written_where_training_finds_them(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(pictures)
    assert audit(pictures, "--masks", "faces", "subject") == FINISHED
    assert files(pictures) == before
    folder = pictures.parent / "audit" / "masks"
    assert files(folder) == {"all.png", "face.png", "deep/all.png"}
    said = capsys.readouterr().out
    assert "masks of 3 pictures are in" in said and f'[data] masks = "{folder.as_posix()}"' in said
    assert "no mask, since nothing of it was found (1): nobody.png" in said
    assert "a mask without subject, since no people were found (1): face.png" in said
    config = DataConfig(images=str(pictures), masks=str(folder), recursive=True, default_caption="x", resolution=192)
    found = {e.path.relative_to(pictures).as_posix(): e.mask for e in scan(config, multiple=16, seed=0).train}
    assert {name: mask and mask.path.relative_to(folder).as_posix() for name, mask in found.items()} == {
        "all.jpg": "all.png",
        "face.png": "face.png",
        "deep/all.png": "deep/all.png",
        "nobody.png": None,
    }


@pytest.mark.parametrize(
    ("wanted", "white", "black"),
    [
        (["faces"], [FACE], [HAND, (20, 190)]),
        (["hands"], [HAND], [FACE, (20, 190)]),
        (["faces", "hands"], [FACE, HAND], [(20, 190)]),
        (["subject"], [FACE, PERSON], [HAND, (199, 239)]),
    ],
)
def test_a_mask_is_white_on_what_is_wanted_alone(wanted: list[str], white: list, black: list) -> None:
    mask = np.array(masks.draw((200, 240), FOUND[200], wanted))
    assert mask.shape == (240, 200) and mask.dtype == np.uint8
    for box in white:
        x, y = (box.left + box.right) // 2, (box.top + box.bottom) // 2
        for at in ((x, y), (box.left, y), (box.right - 1, y), (x, box.top), (x, box.bottom - 1)):
            assert mask[at[1], at[0]] == 255, (box, at)
    for place in black:
        x, y = place if isinstance(place, tuple) else ((place.left + place.right) // 2, (place.top + place.bottom) // 2)
        assert mask[y, x] == 0, place
    assert ((mask > 0) & (mask < 255)).any()  # soft edges


def test_shapes_are_cut_off_at_the_picture_s_edge_and_lie_in_their_middle() -> None:
    for box in (Box(0, 0, 30, 20, 1), Box(170, 220, 200, 240, 1)):
        mask = np.array(masks.draw((200, 240), {"faces": [box]}, ["faces"]))
        assert mask[box.top : box.bottom, (box.left + box.right) // 2].min() == 255
    mask = np.array(masks.draw((201, 240), {"faces": [Box(80, 60, 121, 120, 1)]}, ["faces"]))
    assert (mask == mask[:, ::-1]).all() and 0 < mask.mean() < 60


def test_pictures_that_differ_in_their_suffix_do_not_share_a_mask(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(210, 240, seed=5).save(pictures / "all.png")
    assert audit(pictures, "--masks", "faces") == FINISHED
    said = capsys.readouterr().out
    assert "no mask of all.png: it would have the name of that of all.jpg" in said
    assert Image.open(pictures.parent / "audit" / "masks" / "all.png").width == 200


def test_what_stands_against_masks_is_told_before_any_picture_is_read(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "see", lambda *_: pytest.fail("a picture is read"))
    folder = pictures.parent / "audit" / "masks"
    folder.mkdir(parents=True)
    (folder / "mine.png").write_text("painted by hand")
    assert audit(pictures, "--masks", "faces", "--quick") == BAD_INPUT
    monkeypatch.setattr(run, "not_looked_for", lambda: ["faces, hands and people"])
    assert audit(pictures, "--masks", "faces") == BAD_INPUT
    said = caplog.text
    assert "--quick looks for nothing that a mask could be made of" in said and "there are files in" in said
    assert "faces, hands and people cannot be looked for here" in said and 'pip install -e ".[audit]"' in said
    assert (folder / "mine.png").read_text() == "painted by hand"


def test_without_masks_asked_for_there_are_none(pictures: Path) -> None:
    assert audit(pictures) == FINISHED
    assert not (pictures.parent / "audit" / "masks").exists()
    notes = json.loads((pictures.parent / "audit" / "audit.json").read_text())["notes"]
    assert notes and not any("mask" in note for note in notes)
