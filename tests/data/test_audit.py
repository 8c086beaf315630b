"""An audit finds what is wrong with pictures and captions, and nothing else; a run leaves out what it says to."""

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import train
from tests.data.made import encoded, flipped
from tests.helpers import BAD_INPUT, FINISHED, files
from trainer.data.__main__ import main
from trainer.data.audit import measures, run
from trainer.data.audit.boxes import Box
from trainer.data.audit.duplicates import groups
from trainer.data.audit.find import watermarks
from trainer.data.audit.judge import judge
from trainer.data.audit.picture import Picture, Seen
from trainer.data.audit.rules import Rules
from trainer.data.audit.words import Caption, script
from trainer.data.dataset import DataConfig, scan
from trainer.data.pictures import DataError

SIZE = (320, 320)
PLACES = ("on a beach", "in a forest", "at night", "in the snow", "on a roof", "by a lake", "in a car", "at home")


def painted(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Shapes with sharp edges, before a soft ground: another picture for each seed."""
    chance, width, height = random.Random(seed), *size
    ground = np.random.default_rng(seed).integers(40, 216, (5, 5, 3), np.uint8)
    image = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number in range(14):
        x, y, r = chance.random() * width, chance.random() * height, (0.05 + 0.15 * chance.random()) * min(size)
        colour = tuple(chance.randrange(256) for _ in range(3))
        (draw.ellipse if number % 2 else draw.rectangle)([x - r, y - r, x + r, y + r], fill=colour)
    draw.rectangle([0, 0, width // 12, height // 12], fill="black")
    draw.rectangle([width - width // 12, 0, width, height // 12], fill="white")
    return image


def between(image: Image.Image, low: int, high: int) -> Image.Image:
    """With its luminance squeezed."""
    return image.point([low + round(value * (high - low) / 255) for value in range(256)] * 3)


FAULTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "cut.jpg": ("damaged", lambda: encoded(painted(1), "JPEG")[:4000]),
    "empty.png": ("damaged", lambda: b""),
    "text.png": ("damaged", lambda: b"this is not a picture"),
    "small.png": ("min_side", lambda: encoded(painted(2, (120, 120)), "PNG")),
    "enlarged.png": ("max_enlargement", lambda: encoded(painted(3, (150, 150)), "PNG")),
    "wide.png": ("max_crop", lambda: encoded(painted(4, (1200, 320)), "PNG")),
    "blurred.png": ("min_sharpness", lambda: encoded(painted(5).filter(ImageFilter.GaussianBlur(5)), "PNG")),
    "soft.png": ("min_sharpness", lambda: encoded(painted(6).resize((50, 50)).resize(SIZE), "PNG")),
    "dark.png": ("min_lights", lambda: encoded(between(painted(7), 0, 50), "PNG")),
    "bright.png": ("max_shadows", lambda: encoded(between(painted(8), 205, 255), "PNG")),
    "hazy.png": ("min_contrast", lambda: encoded(between(painted(9), 110, 150), "PNG")),
    "one_colour.png": ("max_flat", lambda: encoded(Image.new("RGB", SIZE, (90, 140, 90)), "PNG")),
    "zz_copy.png": ("copies", lambda: encoded(painted(100), "PNG", compress_level=1)),
    "recompressed.jpg": ("near_duplicates", lambda: encoded(painted(101), "JPEG", quality=40)),
    "resized.png": ("near_duplicates", lambda: encoded(painted(102).resize((280, 280)), "PNG")),
    "no_caption.png": ("captions", lambda: encoded(painted(10), "PNG")),
    "latin1.png": ("captions", lambda: encoded(painted(11), "PNG")),
    "no_trigger.png": ("trigger", lambda: encoded(painted(12), "PNG")),
    "chinese.png": ("one_script", lambda: encoded(painted(13), "PNG")),
    "long.png": ("max_tokens", lambda: encoded(painted(14), "PNG")),
}
CAPTIONS = {
    "latin1.png": "zorp au café".encode("latin-1"),
    "no_trigger.png": b"it sits under a tree",
    "chinese.png": "zorp 站在树下, 阳光明媚".encode(),
    "long.png": b"zorp " + b"big red round creature on the left, " * 90,
}


def put(folder: Path, name: str, data: bytes, caption: bytes | None) -> None:
    (folder / name).write_bytes(data)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_bytes(caption)


def good(folder: Path, count: int = 8) -> None:
    for number in range(count):
        put(folder, f"good{number}.png", encoded(painted(100 + number), "PNG"), f"zorp {PLACES[number]}".encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def nothing_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the extra is installed."""
    monkeypatch.setattr(run, "Finder", lambda: lambda image: {})


def audited(folder: Path, *arguments: str, code: int = FINISHED) -> dict[str, Any]:
    output = folder.parent / "audit"
    words = ["audit", str(folder), "--output", str(output), "--set", "data.resolution=256", *arguments]
    assert main(words) == code
    return dict(json.loads((output / "audit.json").read_text(encoding="utf-8")))


def rules_of(report: dict[str, Any]) -> dict[str, list[str]]:
    """The rules that pictures broke; those without any are left out."""
    found = {entry["file"]: [reason["rule"] for reason in entry["reasons"]] for entry in report["pictures"]}
    return {name: rules for name, rules in found.items() if rules}


# --- faults -----------------------------------------------------------------------------------------------


def test_twenty_faults_are_found_and_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(folder)
    for name, (_, make) in FAULTS.items():
        caption = None if name == "no_caption.png" else CAPTIONS.get(name, f"zorp and {Path(name).stem}".encode())
        put(folder, name, make(), caption)
    assert len(FAULTS) == 20
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    report = audited(folder, "--set", "data.trigger=zorp", "--base", "demo/model")
    assert rules_of(report) == {name: [rule] for name, (rule, _) in FAULTS.items()}
    verdicts = {entry["file"]: entry["verdict"] for entry in report["pictures"]}
    left_out = {name for name, (rule, _) in FAULTS.items() if rule in ("damaged", "copies", "min_side")}
    assert {name for name, verdict in verdicts.items() if verdict == "leave out"} == left_out
    assert {name for name, verdict in verdicts.items() if verdict == "look"} == FAULTS.keys() - left_out
    assert report["counts"] == {"keep": 8, "look": 15, "leave out": 5}
    assert sorted(report["groups"]) == [
        ["good0.png", "zz_copy.png"], ["good1.png", "recompressed.jpg"], ["good2.png", "resized.png"],
    ]  # fmt: skip
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    said = capsys.readouterr().out
    assert "28 pictures: 8 keep, 15 look, 5 leave out" in said and "leave out: damaged (3)" in said


def test_a_reason_is_a_sentence_with_numbers(folder: Path) -> None:
    for name in (
        "small.png",
        "wide.png",
        "enlarged.png",
        "dark.png",
        "blurred.png",
        "zz_copy.png",
        "cut.jpg",
        "latin1.png",
    ):
        put(folder, name, FAULTS[name][1](), name.encode())
    for name in ("cut.jpg", "latin1.png"):
        put(folder, name, FAULTS[name][1](), CAPTIONS.get(name, b"zorp"))
    put(folder, "good.png", encoded(painted(100), "PNG"), b"a caption")
    said = {e["file"]: e["reasons"][0]["says"] for e in audited(folder)["pictures"] if e["reasons"]}
    assert said["small.png"] == "small: the shorter side has 120 pixels, fewer than 128"
    assert said["enlarged.png"] == "enlarged 1.71 times to its bucket, 256 x 256; more than 1.5"
    assert re.fullmatch(r"\d\d% is cut off by the crop to 368 x 176, more than 25%", said["wide.png"])
    assert re.fullmatch(r"dark: 98 % of it lies below 0\.\d\d of white, under 0.25", said["dark.png"])
    assert re.fullmatch(r"not sharp: 0\.\d\d, less than 0.4", said["blurred.png"])
    assert said["zz_copy.png"] == "the same picture as good.png"
    assert said["cut.jpg"].startswith("is damaged (") and str(folder) not in said["cut.jpg"]
    assert said["latin1.png"].startswith("no usable caption: latin1.txt: is not UTF-8, but probably Windows-1252")


def test_a_caption_that_two_pictures_share(folder: Path) -> None:
    """Not if they are copies, and not if it is default_caption."""
    good(folder, 4)
    (folder / "good1.txt").write_text("Zorp  on a beach\n")  # good0's, but for case and spaces
    put(folder, "zz.png", (folder / "good3.png").read_bytes(), b"zorp in the snow")
    put(folder, "x.png", encoded(painted(1), "PNG"), None)
    put(folder, "y.png", encoded(painted(2), "PNG"), None)
    report = audited(folder, "--set", "data.default_caption=zorp")
    assert rules_of(report) == {
        "good0.png": ["same_captions"], "good1.png": ["same_captions"], "zz.png": ["copies"],
    }  # fmt: skip
    assert report["notes"][-1] == "pictures with default_caption: 2"


def test_captions_without_trigger_are_no_fault_where_none_has_it(folder: Path) -> None:
    for number in range(3):
        put(folder, f"{number}.png", encoded(painted(number), "PNG"), PLACES[number].encode())
    report = audited(folder, "--set", "data.trigger=mychar")
    assert rules_of(report) == {}
    assert 'no caption has the trigger, "mychar": training puts it in front of each' in report["notes"]
    assert report["pictures"][0]["caption"]["text"] == "mychar, on a beach"


def test_empty_pictures_are_no_copies(folder: Path) -> None:
    for number, colour in enumerate(("navy", "teal", "gold")):
        put(folder, f"{number}.png", encoded(Image.new("RGB", SIZE, colour), "PNG"), PLACES[number].encode())
    report = audited(folder)
    assert rules_of(report) == {f"{number}.png": ["max_flat"] for number in range(3)} and report["groups"] == []


def test_the_better_one_of_two_has_fewer_faults(folder: Path) -> None:
    """Also if the other one is larger."""
    large = painted(1).resize((480, 480))
    put(folder, "a.png", encoded(between(large, 0, 50), "PNG"), b"zorp at home")
    put(folder, "b.png", encoded(painted(1), "PNG"), b"zorp on a roof")
    report = audited(folder)
    assert report["groups"] == [["b.png", "a.png"]]
    assert rules_of(report) == {"a.png": ["min_lights", "near_duplicates"]}


def test_metadata_jsonl(folder: Path) -> None:
    for number in range(4):
        put(folder, f"{number}.png", encoded(painted(number), "PNG"), None)
    rows = [{"file_name": "0.png", "text": "zorp"}, {"file_name": "1.png"}, {"file_name": "9.png", "text": "gone"}]
    lines = [json.dumps(row) for row in rows] + ["not json"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    report = audited(folder)
    assert rules_of(report) == {name: ["captions"] for name in ("1.png", "2.png", "3.png")}
    says = {entry["file"]: entry["reasons"][0]["says"] for entry in report["pictures"] if entry["reasons"]}
    assert 'line 2: 1.png has no "text"' in says["1.png"] and says["2.png"] == "no caption"
    notes = "\n".join(report["notes"])
    assert "9.png" in notes and "line 4: is not JSON" in notes and "1.png has no" not in notes


def test_folders_below_and_a_held_out_folder(folder: Path) -> None:
    for name in ("a", "a/b", "held"):
        (folder / name).mkdir()
        put(folder / name, "1.png", encoded(painted(len(name)), "PNG"), name.encode())
    options = ("--set", "data.recursive=true", "--set", f"data.held_out={folder / 'held'}")
    assert [entry["file"] for entry in audited(folder, *options)["pictures"]] == ["a/1.png", "a/b/1.png"]
    assert [entry["file"] for entry in audited(folder / "a")["pictures"]] == ["1.png"]


def test_orientation_and_bucket_are_training_s(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    put(folder, "turned.jpg", encoded(painted(1, (400, 300)), "JPEG", exif=exif), b"a")
    put(folder, "plain.png", encoded(painted(2, (700, 500)), "PNG"), b"b")
    report = audited(folder)
    examples = scan(DataConfig(images=str(folder), resolution=256), multiple=16, seed=0).train
    for entry, example in zip(report["pictures"], examples, strict=True):
        assert tuple(entry["measures"]["size"]) == example.size and tuple(entry["bucket"]) == example.bucket
        assert entry["sha256"] == example.digest and entry["measures"]["pixels"] == example.pixels
    assert tuple(report["pictures"][1]["measures"]["size"]) == (300, 400)
    assert report["pictures"][1]["done"] == ["turned upright, as their EXIF data say"]


# --- measures ---------------------------------------------------------------------------------------------


def test_measures_do_not_depend_on_the_size() -> None:
    large = painted(1, (1600, 1200)).filter(ImageFilter.GaussianBlur(1))
    one = measures.measure(large)
    for scale in (0.75, 0.5):
        other = measures.measure(large.resize((int(1600 * scale), int(1200 * scale)), Image.Resampling.LANCZOS))
        for name in ("sharpness", "shadows", "lights", "contrast", "flat"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=0.04), name
        assert groups([one.perceptual_hash, other.perceptual_hash], 0.05) == [[0, 1]]


def test_sharpness_is_the_blur_effect() -> None:
    """By the formula as it stands, pixel by pixel."""
    values = np.asarray(painted(3, (24, 20)).convert("L"), np.float64) / 255
    lost, total = 0.0, 0.0
    for x in range(24):
        column = values[:, x]
        mean = [np.mean([column[min(max(y + k, 0), 19)] for k in range(-4, 5)]) for y in range(20)]
        for y in range(1, 20):
            before, after = abs(column[y] - column[y - 1]), abs(mean[y] - mean[y - 1])
            if before > 2 / 255:
                lost, total = lost + max(before - after, 0), total + before
    assert measures._differences(values) == pytest.approx((total, lost))


def test_a_blurred_ground_behind_a_sharp_subject_is_no_fault() -> None:
    image = painted(5).filter(ImageFilter.GaussianBlur(6))
    assert measures.measure(image).sharpness < 0.4
    image.paste(painted(6).crop((100, 100, 200, 200)), (100, 100))
    assert measures.measure(image).sharpness > 0.6


def test_a_picture_that_was_moved_is_not_sharp() -> None:
    """It is blurred along one axis only."""
    values = np.asarray(painted(5, (344, 320)), np.float32)
    moved = np.mean([values[:, shift : shift + 320] for shift in range(25)], axis=0)
    assert measures.measure(Image.fromarray(moved.astype(np.uint8))).sharpness < 0.4


def test_groups_are_linked_by_what_lies_between() -> None:
    bits = ["0" * 64, "0" * 60 + "000f", "0" * 60 + "00ff", "f" * 64]
    assert groups(bits, 0.03) == [[0, 1, 2]]
    assert groups(bits, 0.0) == groups(bits[:1], 1.0) == groups([], 1.0) == []


def test_scripts() -> None:
    assert script("a cat by the tree, 站在树下的猫") == "Chinese and Latin"
    assert script("zorp 站在树下", "zorp") == "Chinese" and script("站在树下 by a Nikon D5") != "Latin"
    assert script("a cat that sits on a wall by 猫") == "Latin" and script("1, 2!") == ""
    assert script("木の下に立つ") == "Japanese" and script("나무 아래") == "Korean" and script("кот") == "Cyrillic"


# --- what is found in pictures, and rules -----------------------------------------------------------------


def picture(**boxes: list[Box]) -> Picture:
    found = measures.measure(painted(1))
    return Picture("a.png", Seen("1", "", found, (), boxes), (256, 256), 1.0, 0.0, Caption("a", True), None)


def rules_broken(made: Picture, rules: Rules = Rules()) -> list[tuple[str, str]]:  # noqa: B008
    return list(judge([made], rules, resolution=256, token_limit=512)[0][0].reasons)


def test_boxes_are_counted() -> None:
    def box(text: str = "") -> Box:
        return Box(0, 0, 9, 9, 0.9, text)

    assert rules_broken(picture(faces=[box()], hands=[box(), box()], people=[box()], texts=[])) == []
    assert rules_broken(picture(faces=[box(), box()])) == [("max_faces", "2 faces, more than 1")]
    assert rules_broken(picture(hands=3 * [box()])) == [("max_hands", "3 hands, more than 2")]
    assert rules_broken(picture(people=[box()]), Rules(max_people=0)) == [("max_people", "1 person, more than 0")]
    assert rules_broken(picture(texts=[box("EXIT")])) == [("max_texts", '1 line of text, more than 0: "EXIT"')]
    assert rules_broken(picture(watermarks=[box("© me")])) == [("watermarks", 'a watermark: "© me"')]


def test_watermarks_are_addresses_agencies_and_what_repeats() -> None:
    texts = ["Bakery", "www.photos.com", "© 2020 me", "shutterstock", "sale", "Sale", "SALE", "@someone"]
    lines = [Box(0, 0, 9, 9, 0.9, text) for text in texts]
    assert [box.text for box in watermarks(lines)] == texts[1:]


def test_rules_are_read_from_toml(folder: Path, tmp_path: Path) -> None:
    put(folder, "dark.png", FAULTS["dark.png"][1](), b"zorp")
    put(folder, "good.png", encoded(painted(100), "PNG"), b"zorp on a beach")
    rules = tmp_path / "rules.toml"
    rules.write_text('leave_out = ["min_lights"]\nmin_contrast = 1.0\n')
    report = audited(folder, "--rules", str(rules))
    assert rules_of(report) == {"dark.png": ["min_lights"], "good.png": ["min_contrast"]}
    assert [entry["verdict"] for entry in report["pictures"]] == ["leave out", "look"]
    assert report["rules"]["leave_out"] == ["min_lights"] and report["rules"]["max_crop"] == 0.25


def test_every_rule_can_be_named_and_has_a_reason() -> None:
    names = [field.name for field in dataclasses.fields(Rules) if field.name != "leave_out"]
    assert Rules(leave_out=("damaged", *names)).problems() == [] and len(names) > 15
    (problem,) = Rules(leave_out=("min_sied",)).problems()
    assert problem.startswith('leave_out: "min_sied" is no rule; rules are damaged, min_side, ')


# --- the command ------------------------------------------------------------------------------------------


def test_bad_arguments_are_told_together(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good(folder, 1)
    rules = tmp_path / "rules.toml"
    rules.write_text("min_sied = 3\nmax_crop = 7\n")
    words = [
        "audit",
        str(tmp_path / "gone"),
        "--output",
        str(tmp_path / "out"),
        "--rules",
        str(rules),
        "--base",
        "nowhere",
    ]
    assert main([*words, "--set", "data.resolution=x"]) == BAD_INPUT
    for said in (
        "min_sied: unknown key; did you mean min_side?",
        "max_crop must be from 0 to 1",
        "resolution",
        "nowhere",
    ):
        assert said in caplog.text, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["images", "images/audit", "file"])
def test_outputs_that_are_refused(folder: Path, tmp_path: Path, output: str, caplog: pytest.LogCaptureFixture) -> None:
    good(folder, 1)
    (tmp_path / "file").write_text("")
    assert main(["audit", str(folder), "--output", str(tmp_path / output)]) == BAD_INPUT
    assert ("is a file" if output == "file" else "which is only read") in caplog.text
    assert files(folder) == {"good0.png", "good0.txt"}


def test_a_folder_without_pictures(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "below").mkdir()
    good(folder / "below", 1)
    assert main(["audit", str(folder), "--output", str(tmp_path / "out")]) == BAD_INPUT
    assert "there is no picture in it" in caplog.text and "recursive = true" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_stopped_leaves_the_older_audit_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    good(folder, 3)
    audited(folder)
    output = folder.parent / "audit"
    before = {name: (output / name).read_bytes() for name in files(output)}
    assert before.keys() == {"audit.json", "audit.html"}
    put(folder, "more.png", encoded(painted(1), "PNG"), b"zorp")

    def stop(*_: Any) -> None:
        raise error

    for place in ("trainer.data.audit.picture.measure", "trainer.files._flush"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert main(["audit", str(folder), "--output", str(output)]) == 1
        assert {name: (output / name).read_bytes() for name in files(output)} == before
    assert len(audited(folder)["pictures"]) == 4


def test_what_the_extra_would_add_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good(folder, 1)
    monkeypatch.setattr(run, "not_looked_for", lambda: ["faces, hands and people", "text and watermarks"])
    report = audited(folder)
    said = "not looked for: faces, hands and people; text and watermarks. To look for them: pip install"
    assert said in capsys.readouterr().out
    assert any(said in note for note in report["notes"])
    assert said in (folder.parent / "audit" / "audit.html").read_text(encoding="utf-8")
    assert report["pictures"][0]["boxes"] == {}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_all_in_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = {"faces": [Box(10, 20, 60, 90, 0.9)], "hands": []}
    monkeypatch.setattr(run, "Finder", lambda: lambda image: boxes)
    good(folder, 3)
    put(folder, "z<b>.png", encoded(painted(100), "PNG"), b"<script>alert(1)</script>")
    put(folder, "cut.jpg", FAULTS["cut.jpg"][1](), b"zorp")
    audited(folder)
    text = (folder.parent / "audit" / "audit.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "b")] and "http" not in text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert sorted(str(attrs["alt"]) for attrs in images) == ["good0.png", "good1.png", "good2.png", "z<b>.png"]
    assert all(str(attrs["src"]).startswith("data:image/jpeg;base64,") for attrs in images)
    rectangles = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert len(rectangles) == 4 and rectangles[0] == {
        "class": "faces", "x": "10", "y": "20", "width": "50", "height": "70",
    }  # fmt: skip
    assert [str(attrs["class"]) for tag, attrs in page.tags if tag == "article"] == [
        "card keep", "card leave-out", "card leave-out", "card keep", "card keep",
    ]  # fmt: skip
    assert [str(attrs["viewbox"]) for tag, attrs in page.tags if tag == "svg"] == 4 * ["0 0 320 320"]


# --- a run that heeds it ----------------------------------------------------------------------------------


def scanned(folder: Path, **settings: Any) -> Any:
    data = DataConfig(images=str(folder), resolution=256, audit=str(folder.parent / "audit" / "audit.json"), **settings)
    return scan(data, multiple=16, seed=0)


def problems(folder: Path, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        scanned(folder, **settings)
    return caught.value.problems


def test_a_run_leaves_out_what_the_audit_says_to(folder: Path) -> None:
    """Also of what is held out; what is damaged is no problem then; and nothing else is left out."""
    good(folder)
    for name in ("cut.jpg", "small.png", "zz_copy.png", "dark.png"):
        put(folder, name, FAULTS[name][1](), b"\xff\xfe" if name == "small.png" else name.encode())
    audited(folder)
    dataset = scanned(folder, held_out=2)
    names = {example.path.name for example in (*dataset.train, *dataset.held_out)}
    assert names == {f"good{number}.png" for number in range(8)} | {"dark.png"}
    notes = [note for note in dataset.notes if "audit" in note]
    assert notes == [
        "left out by the audit: damaged (1): cut.jpg",
        "left out by the audit: min_side, captions (1): small.png",
        "left out by the audit: copies (1): zz_copy.png",
    ]


def test_the_plan_says_what_the_audit_leaves_out(run_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rules = run_toml.parent / "pictures", run_toml.parent / "rules.toml"
    put(folder, "dark.png", encoded(between(painted(7, (64, 64)), 0, 50), "PNG"), b"a dark one")
    rules.write_text('leave_out = ["min_lights"]')
    audited(folder, "--config", str(run_toml), "--rules", str(rules), "--set", "data.resolution=64")
    file = run_toml.parent / "audit" / "audit.json"
    words = ["--config", str(run_toml), "--plan", "--set"]
    assert train.main([*words, f"data.audit={file}"]) == FINISHED
    said = capsys.readouterr().out
    assert "pictures     4 for training, 2 held out" in said
    assert "note         left out by the audit: min_lights (1): dark.png" in said
    assert train.main([*words, f"data.audit={file.parent}"]) == BAD_INPUT


def test_a_folder_that_is_held_out_is_not_in_the_audit_but_heeds_it(folder: Path) -> None:
    good(folder, 3)
    put(folder, "small.png", FAULTS["small.png"][1](), b"small")
    audited(folder)
    held = folder.parent / "held"
    (held / "below").mkdir(parents=True)
    put(held / "below", "new.png", encoded(painted(1), "PNG"), b"new")
    put(held, "small.png", FAULTS["small.png"][1](), b"small")
    dataset = scanned(folder, held_out=str(held), recursive=True)
    assert [example.path.name for example in dataset.held_out] == ["new.png"] and len(dataset.train) == 3


def test_renamed_pictures_are_known_and_one_of_two_copies_stays(folder: Path) -> None:
    good(folder, 2)
    put(folder, "small.png", FAULTS["small.png"][1](), b"small")
    shutil.copy(folder / "good0.png", folder / "copy.png")
    (folder / "copy.txt").write_text("zorp again")
    audited(folder)
    (folder / "small.png").rename(folder / "renamed.png")
    (folder / "small.txt").rename(folder / "renamed.txt")
    assert [example.path.name for example in scanned(folder).train] == ["copy.png", "good1.png"]


def test_an_audit_of_other_pictures(folder: Path) -> None:
    good(folder, 3)
    audited(folder)
    (folder / "good0.png").write_bytes(flipped((folder / "good1.png").read_bytes(), 0.99))
    put(folder, "new.png", encoded(painted(1), "PNG"), b"new")
    file = folder.parent / "audit" / "audit.json"
    problem = problems(folder)[0]
    assert problem == (
        f"audit: {file} does not know 2 of 4 pictures in {folder}, added or changed since: good0.png, new.png; "
        f"audit again: python -m trainer.data audit {folder} --output {file.parent}"
    )
    other = folder.parent / "other"
    other.mkdir()
    for number in range(2):
        put(other, f"good{number}.png", encoded(painted(number), "PNG"), b"zorp")
    (other / "good1.txt").write_bytes(b"\xff")
    found = scan_problems(other, file)
    assert any(f"is of other pictures, those of {folder}: none of {other} is in it" in line for line in found)
    assert any("good1.txt: is not UTF-8" in line for line in found)  # all at once


def scan_problems(folder: Path, file: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        scan(DataConfig(images=str(folder), resolution=256, audit=str(file)), multiple=16, seed=0)
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-40], "is damaged, or is no audit.json"),
        (lambda text: "[]", "is damaged, or is no audit.json"),
        (lambda text: text.replace('"sha256"', '"sha"'), "'sha256' is missing"),
        (lambda text: text.replace('"keep"', '"kept"'), "is damaged, or is no audit.json"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "was written by another version"),
    ],
)
def test_a_damaged_audit(folder: Path, change: Callable[[str], str], said: str) -> None:
    good(folder, 2)
    audited(folder)
    file = folder.parent / "audit" / "audit.json"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    (problem,) = problems(folder)
    assert problem.startswith("audit: ") and said in problem


def test_an_audit_that_is_not_there(folder: Path) -> None:
    good(folder, 1)
    (problem,) = problems(folder)
    assert "there is no file" in problem and "python -m trainer.data audit" in problem


def test_an_audit_that_leaves_nothing(folder: Path) -> None:
    put(folder, "small.png", FAULTS["small.png"][1](), b"small")
    audited(folder)
    (problem,) = problems(folder)
    assert "leaves out all pictures" in problem


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_left_out(folder: Path) -> None:
    good(folder, 2)
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("zorp is a pipe")
    report = audited(folder)
    assert rules_of(report) == {"pipe.png": ["damaged"]} and report["pictures"][2]["sha256"] == ""
    assert len(scanned(folder).train) == 2


def test_a_name_that_is_not_utf8(folder: Path) -> None:
    good(folder, 2)
    try:
        (folder / "good0.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    except OSError:
        pytest.skip("this disk takes no such names")
    report = audited(folder)
    assert rules_of(report) == {"\\udcff.png": ["captions"]}
    assert len(scanned(folder, default_caption="zorp").train) == 2


def test_hashes_are_those_of_the_files(folder: Path) -> None:
    good(folder, 1)
    entry = audited(folder)["pictures"][0]
    assert entry["sha256"] == hashlib.sha256((folder / "good0.png").read_bytes()).hexdigest()
    assert Image.open(io.BytesIO(measures.thumbnail(painted(1, (1000, 500))))).size == (256, 128)
