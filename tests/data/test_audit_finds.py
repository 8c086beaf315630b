"""What the extra `audit` finds in real pictures: those that scikit-image and matplotlib carry."""

import json
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.helpers import FINISHED
from trainer.data.__main__ import main
from trainer.data.audit import people
from trainer.data.audit.find import TextFinder
from trainer.data.audit.people import PeopleFinder

litert = pytest.importorskip("ai_edge_litert", reason='faces, hands and people need pip install -e ".[audit]"')
skimage_data = pytest.importorskip("skimage.data", reason="its pictures are in the extra dev")

FACE = (224, 115)  # the astronaut's nose
WITHOUT_PEOPLE = ("coffee", "chelsea", "rocket", "motorcycle_left", "gravel", "hubble_deep_field", "page")


def picture(name: str) -> Image.Image:
    (path,) = Path(skimage_data.__file__).parent.glob(f"{name}.*g")
    return Image.open(path).convert("RGB")


@pytest.fixture(scope="module")
def find() -> PeopleFinder:
    return PeopleFinder()


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_the_astronaut_has_one_face(find: PeopleFinder, scale: float) -> None:
    size = round(512 * scale)
    found = find(picture("astronaut").resize((size, size)))
    assert [*found] == ["faces", "hands", "people"]
    (face,), (person,) = found["faces"], found["people"]
    assert found["hands"] == [] and face.score > 0.8
    left, top, right, bottom = (edge / scale for edge in (face.left, face.top, face.right, face.bottom))
    assert left < FACE[0] < right and top < FACE[1] < bottom and 70 < right - left < 140 and 70 < bottom - top < 140
    assert person.left <= face.left and person.right >= face.right and person.bottom == size


def test_boxes_move_with_the_picture(find: PeopleFinder) -> None:
    """Whatever its shape."""
    ground = Image.new("RGB", (1400, 700), "grey")
    ground.paste(picture("astronaut"), (800, 100))
    (face,) = find(ground)["faces"]
    assert face.left < 800 + FACE[0] < face.right and face.top < 100 + FACE[1] < face.bottom
    ground.paste(picture("astronaut"), (100, 150))
    assert len(find(ground)["faces"]) == len(find(ground)["people"]) == 2


@pytest.mark.parametrize("name", WITHOUT_PEOPLE)
def test_a_picture_without_people_has_none(find: PeopleFinder, name: str) -> None:
    assert find(picture(name)) == {"faces": [], "hands": [], "people": []}


def test_a_palm_alone_is_no_hand(find: PeopleFinder) -> None:
    """One is found in this portrait's chin; there are no landmarks of a hand in it."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    assert len(find._detect(people.PALM, portrait)) == 1
    found = find(portrait)
    assert found["hands"] == [] and len(found["faces"]) == 1


def test_a_hand_s_box_turns_with_its_landmarks(find: PeopleFinder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture of a hand is at hand: with a palm that points to the right, and landmarks on a line along it."""
    palm = people._Found(
        0.9, np.array([90.0, 90, 110, 110]), np.array([[90.0, 100], [0, 0], [110, 100]])
    )  # to the right
    landmarks = np.zeros((21, 3), np.float32)
    landmarks[:, :2] = np.linspace((112, 112), (112, 0), 21)
    monkeypatch.setattr(find, "_detect", lambda *_: [palm])
    monkeypatch.setattr(find, "_run", lambda *_: [landmarks.reshape(-1), np.array([0.9]), None, None])
    (hand,) = find._hands(Image.new("RGB", (300, 200)))
    # the region's centre is half a palm along, and from there half a region to the right, with a tenth around
    assert (hand.left, hand.right) == (round(110 - 2.6), round(110 + 26 + 2.6)) and hand.top == hand.bottom == 100


def test_an_audit_of_them(tmp_path: Path) -> None:
    for name in ("astronaut", "coffee"):
        picture(name).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    two = Image.new("RGB", (1024, 512))
    for left in (0, 512):
        two.paste(picture("astronaut"), (left, 0))
    two.save(tmp_path / "two.png")
    (tmp_path / "two.txt").write_text("two of them")
    output = tmp_path.parent / f"{tmp_path.name} audit"
    assert main(["audit", str(tmp_path), "--output", str(output), "--set", "data.resolution=512"]) == FINISHED
    entries = {entry["file"]: entry for entry in json.loads((output / "audit.json").read_text())["pictures"]}
    assert [len(entries[name]["boxes"]["faces"]) for name in ("astronaut.png", "coffee.png", "two.png")] == [1, 0, 2]
    assert {reason["rule"] for reason in entries["two.png"]["reasons"]} == {"max_faces", "max_people"}
    assert entries["astronaut.png"]["verdict"] == entries["coffee.png"]["verdict"] == "keep"


def test_text_and_watermarks() -> None:
    pytest.importorskip("rapidocr", reason='text needs pip install -e ".[audit]"')
    pytest.importorskip("onnxruntime", reason='text needs pip install -e ".[audit]"')
    find = TextFinder()
    assert find(picture("astronaut")) == find(picture("coffee")) == {"texts": [], "watermarks": []}
    signed = picture("coffee").resize((2400, 1600))
    draw, font = ImageDraw.Draw(signed), ImageFont.load_default(60)
    draw.text((1500, 1450), "© www.photos.com", font=font, fill="white")
    draw.text((100, 100), "GOOD MORNING", font=font, fill="white")
    found = find(signed)
    (text,), (mark,) = found["texts"], found["watermarks"]
    assert text.text.replace(" ", "") == "GOODMORNING" and "photos.com" in mark.text
    assert abs(text.left - 100) < 40 and 1400 < mark.top < mark.bottom <= 1600 and mark.left > 1400


def test_the_astronaut_s_mask_is_on_the_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("astronaut", "coffee"):
        picture(name).save(tmp_path / "pictures" / f"{name}.jpg")
    arguments = ["audit", str(tmp_path / "pictures"), "--output", str(tmp_path / "audit"), "--masks", "faces"]
    assert main(arguments) == FINISHED
    (file,) = (tmp_path / "audit" / "masks").iterdir()
    mask = np.array(Image.open(file))
    assert file.name == "astronaut.png" and mask.shape == (512, 512)
    assert mask[FACE[1] - 30 : FACE[1] + 30, FACE[0] - 30 : FACE[0] + 30].min() == 255
    assert mask[260:].max() == 0 and mask[:, 330:].max() == 0 and 0.03 < (mask > 0).mean() < 0.12
    assert "no mask, since nothing of it was found (1): coffee.jpg" in capsys.readouterr().out
