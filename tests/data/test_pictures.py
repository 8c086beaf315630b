"""One picture, opened in any way: from a file, by a script's PIL, for a thumbnail. The pixels are the same."""

import logging
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from initializers import warm_start
from tests.data.made import encoded, noise
from tests.test_adapter import tiny
from trainer import cli
from trainer.adapter import AdapterWeights, InitContext, Seed
from trainer.compare.report import contact_sheet
from trainer.data.pictures import DataError, open_picture, upright

TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter turn


def painted(mode: str) -> Image.Image:
    """48 x 32 pixels of which no two rows or columns are the same."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (32, 48, 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def profile() -> bytes:
    """sRGB with red and blue swapped."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    return swapped.replace("sRGB".encode("utf-16be"), "tRGB".encode("utf-16be"))


def save(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.{'jpg' if kind == 'turned' else 'png'}"
    if kind == "turned" or kind == "turned png":
        painted("RGB").save(path, exif=TURNED)
    elif kind == "transparent":
        painted("RGBA").save(path)
    elif kind == "turned and transparent":
        painted("RGBA").save(path, exif=TURNED)
    elif kind == "transparent palette":
        painted("RGB").quantize(16).save(path, transparency=3)
    elif kind == "grey with alpha":
        painted("LA").save(path)
    elif kind == "16 bits":
        Image.fromarray(np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40).save(path)
    else:
        painted("RGB").save(path, icc_profile=profile())
    return path


KINDS = ("turned", "turned png", "transparent", "turned and transparent", "transparent palette", "grey with alpha")


@pytest.mark.parametrize("kind", [*KINDS, "16 bits", "profile"])
def test_an_open_picture_is_treated_as_its_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, kind)
    expected = open_picture(path)
    assert expected.tobytes() != Image.open(path).convert("RGB").tobytes()
    assert upright(Image.open(path), "it").tobytes() == expected.tobytes()

    seen = list[Image.Image]()

    def initialize(context: InitContext, _: Any) -> Seed:
        seen.extend(open_picture(image) for image in context.images)
        return Seed(AdapterWeights({}), {})

    monkeypatch.setattr("initializers.random.initialize", initialize)
    given = Image.open(path)
    warm_start(tiny(), [given], init="random")
    warm_start(tiny(), [path], init="random")
    assert [(picture.size, picture.tobytes()) for picture in seen] == 2 * [(expected.size, expected.tobytes())]
    assert given.getexif().get(0x0112) == Image.open(path).getexif().get(0x0112)  # the script's picture is as it was


def test_a_picture_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it: cannot be used \(pixels are floating-point"):
        upright(Image.fromarray(np.zeros((4, 4), np.float32)), "it")
    painted("RGB").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="images: picture 2: cannot be used"):
        warm_start(tiny(), [painted("RGB"), Image.open(tmp_path / "cut.jpg")], init="random")


@pytest.mark.parametrize("kind", KINDS)
def test_thumbnails_of_a_report_show_pictures_as_they_are_trained_on(kind: str, tmp_path: Path) -> None:
    run = {"subject": "a", "arm": "random", "seed": 0, "learning_rate": 1e-3, "folder": "run"}
    run["curve"] = [{"val_loss": 1.0}]
    (tmp_path / "run" / "samples").mkdir(parents=True)
    painted("RGB").save(tmp_path / "run" / "samples" / "step-000000-0-0.png")

    def sheet(path: Path) -> bytes:
        subject = {"name": "a", "group": "", "held_out": [{"path": str(path)}], "train": []}
        made = contact_sheet(tmp_path, {"subjects": [subject], "seeds": [0]}, [run], ["random"])
        assert made is not None
        return made.tobytes()

    path = save(tmp_path, kind)
    open_picture(path).save(tmp_path / "plain.png")
    assert sheet(path) == sheet(tmp_path / "plain.png")
    assert sheet(path) != sheet(tmp_path / "gone.png")  # which is left out


def test_no_warning_of_the_library_reaches_the_console(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """In a program; scripts keep their own filters."""
    picture = encoded(noise(), "TIFF")
    path = tmp_path / "a.tif"
    path.write_bytes(picture[:4] + bytes([8, 0, 0, 0]) + picture[8:])
    cli.guarded(lambda: None)
    for _ in range(2):  # what the library says itself, and what it may say one day
        with suppress(DataError):
            open_picture(path)
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "Image.py", 1, module="PIL.Image")
        logging.getLogger("PIL.TiffImagePlugin").warning("More samples per pixel than can be decoded: 5")
    assert not [*recwarn] and not caplog.records
