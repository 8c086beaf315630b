"""Masks lie over their pictures to the pixel, are pooled as a plain loop pools, and what is wrong with one is told."""

import itertools
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.made import encoded, noise
from trainer.data import masks
from trainer.data.dataset import DataConfig, Dataset, load_picture, scan
from trainer.data.folders import FolderConfig
from trainer.data.pictures import DataError

TURNED_BACK = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}
"""From an upright picture to how a camera stores it, for each of EXIF's orientations."""
SIZES = [(65, 91), (131, 67), (64, 64), (71, 59)]


def blob(width: int, height: int) -> Image.Image:
    """White and black, in a shape that no turn or flip leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    white = ((x - width / 3) ** 2 + (y - height / 4) ** 2 < (min(width, height) / 4) ** 2) | (y > 0.9 * height)
    return Image.fromarray((255 * white).astype(np.uint8))


def put(folder: Path, name: str, size: tuple[int, int] = (64, 64)) -> Path:
    noise(*size, seed=zlib.crc32(name.encode())).save(folder / name)
    return folder / name


def scanned(folder: Path, **settings) -> Dataset:
    settings = {"resolution": 64, "default_caption": "a cat", **settings}
    return scan(DataConfig(images=str(folder), **settings), multiple=16, seed=0)


def problems_of(folder: Path, **settings) -> list[str]:
    with pytest.raises(DataError) as caught:
        scanned(folder, **settings)
    return caught.value.problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


# --- geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_over_its_picture_to_the_pixel(orientation: int, folder: Path) -> None:
    """The picture is painted with the mask itself. The mask is stored upright, or turned like its picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for (width, height), turned in itertools.product(SIZES, (False, True)):
        mask = stored = blob(width, height)
        for way in TURNED_BACK[orientation]:
            stored = stored.transpose(way)
        name = f"{width}-{turned}"
        stored.convert("RGB").save(folder / f"{name}.png", exif=exif)
        (stored if turned else mask).save(folder / f"{name}.mask.png", exif=exif if turned else Image.Exif())
    examples = scanned(folder, resolution=128).train
    assert len(examples) == 8 and len({e.bucket for e in examples}) == 4
    for example in examples:
        assert example.mask is not None and example.size in SIZES
        seen, laid = np.array(load_picture(example)), np.array(masks.load(example.mask, example.bucket))
        assert laid.shape == (example.bucket[1], example.bucket[0]) and 0 < laid.mean() < 255
        assert (seen == laid[..., None]).all()


def test_latents_weigh_what_their_pixels_do_on_average(folder: Path) -> None:
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80), np.uint8))
    for outside in (0.0, 0.3, 1.0):
        found = masks.weights(mask, (6, 10), outside)
        values, plain = np.array(mask).astype(float) / 255, np.zeros((6, 10))
        for i in range(6):
            for j in range(10):
                cell = values[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                plain[i, j] = sum(outside + (1 - outside) * value for value in cell.ravel()) / 64
        expected = torch.tensor(plain / plain.mean(), dtype=torch.float32)
        assert found.shape == (1, 1, 6, 10) and found.dtype == torch.float32
        torch.testing.assert_close(found[0, 0], expected, rtol=1e-6, atol=0)
        assert float(found.double().mean()) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("outside", [0.0, 0.1, 0.37])
def test_a_white_mask_weighs_nothing_differently(outside: float, folder: Path) -> None:
    Image.new("L", (91, 65), "white").save(folder / "a.mask.png")
    put(folder, "a.png", (91, 65))
    (example,) = scanned(folder).train
    assert example.mask is not None
    laid = masks.load(example.mask, example.bucket)
    cells = laid.height // 8, laid.width // 8
    assert torch.equal(masks.weights(laid, cells, outside), torch.ones(1, 1, *cells))


# --- found ------------------------------------------------------------------------------------------------


def test_masks_are_found_beside_pictures_or_in_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "val").mkdir()
    (tmp_path / "masks" / "deep").mkdir(parents=True)
    (tmp_path / "masks" / "val").mkdir()
    for name in ("a.jpg", "b.png", "c.webp", "d.png", "deep/a.png", "val/a.png"):
        put(folder, name)
    places = [
        folder / "a.mask.png",
        *(tmp_path / "masks" / n for n in ("b.png", "c.mask.png", "deep/a.png", "val/a.png")),
    ]
    for number, place in enumerate(places):
        Image.new("L", (64, 64), 100 + number).save(place)
    (tmp_path / "masks" / "read me.txt").write_text("")
    dataset = scanned(folder, recursive=True, masks=str(tmp_path / "masks"), held_out=str(folder / "val"))
    found = {e.path.relative_to(folder).as_posix(): e.mask and e.mask.path for e in (*dataset.train, *dataset.held_out)}
    names = ("a.jpg", "b.png", "c.webp", "deep/a.png", "val/a.png")
    assert found == {**dict(zip(names, places, strict=True)), "d.png": None}
    assert len({e.mask.digest for e in (*dataset.train, *dataset.held_out) if e.mask}) == 5
    assert not any("mask" in note for note in dataset.notes)


def test_masks_in_a_folder_below_the_pictures_are_no_pictures(folder: Path) -> None:
    (folder / "masks").mkdir()
    put(folder, "a.png")
    Image.new("L", (64, 64), "white").save(folder / "masks" / "a.png")
    for recursive in (False, True):
        (example,) = scanned(folder, masks=str(folder / "masks"), recursive=recursive).train
        assert example.mask is not None and example.mask.path == folder / "masks" / "a.png"


def test_without_masks_there_are_none(folder: Path) -> None:
    put(folder, "a.png")
    assert scanned(folder).train[0].mask is None


# --- what is wrong ----------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_masks_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "masks"
    there.mkdir()
    wrong = {
        "size.png": (noise(63, 64).convert("L"), "size.png: is 63 x 64 pixels, and its picture size.jpg is 64 x 64"),
        "colour.png": (noise(), "colour.png: is a mask in colours"),
        "clear.png": (Image.new("RGBA", (64, 64)), "clear.png: is a mask with transparent parts"),
        "black.png": (Image.new("L", (64, 64)), "black.png: is all black, so that nothing would be learned"),
    }
    said = [text for _, text in wrong.values()]
    for name, (mask, _) in wrong.items():
        put(folder, name.replace(".png", ".jpg"))
        mask.save(there / name)
    put(folder, "torn.jpg")
    (there / "torn.png").write_bytes(encoded(noise(), "PNG")[:300])
    (there / "text.png").write_text("no picture")
    put(folder, "text.jpg")
    Image.new("L", (64, 64), "white").save(there / "alone.png")
    Image.new("L", (64, 64), "white").save(folder / "lost.mask.png")
    Image.new("L", (64, 64), "white").save(there / "size.jpg")
    put(folder, "twice.jpg")
    for path in (there / "twice.png", folder / "twice.mask.png"):
        Image.new("L", (64, 64), "white").save(path)
    said += ["torn.png: is damaged", "text.png: is not a PNG", "size.jpg: is no PNG; masks are NAME.png"]
    said += ["alone.png: is the mask of a picture alone, and there is none in", "twice.jpg: has 2 masks, "]
    said += ["lost.mask.png: is the mask of a picture lost, and there is none in"]
    problems = problems_of(folder, masks=str(there))
    assert len(problems) == len(said) == 10
    for text in said:
        assert sum(text in problem for problem in problems) == 1, (text, problems)


def test_a_mask_that_lies_as_the_camera_stored_the_picture_is_told_of(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(64, 48).save(folder / "a.jpg", exif=exif)
    Image.new("L", (64, 48), "white").save(folder / "a.mask.png")
    (problem,) = problems_of(folder)
    assert "a.mask.png: is 64 x 48 pixels, and its picture a.jpg is 48 x 64" in problem and "in a viewer" in problem


def test_a_mask_whose_white_is_cut_off_is_told_of(folder: Path) -> None:
    put(folder, "a.png", (400, 64))
    mask = Image.new("L", (400, 64))
    mask.paste(255, (0, 0, 30, 64))
    mask.save(folder / "a.mask.png")
    (problem,) = problems_of(folder)
    assert "is all black within the crop of its picture to " in problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_outside": -0.1}, "mask_outside must be from 0 to 1"),
        ({"mask_outside": 1.1}, "mask_outside must be from 0 to 1"),
        ({"masks": "nowhere"}, "masks: there is no folder "),
        ({"masks": ""}, "masks: there is no folder "),
        ({"masks": "images"}, "is a folder of pictures; masks beside pictures, NAME.mask.png, are found without it"),
    ],
)
def test_settings_of_masks_are_checked(settings, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    put(folder, "a.png")
    (problem,) = problems_of(folder, **settings)
    assert said in problem


def test_a_mask_that_changes_while_a_run_goes_on_is_told_of(folder: Path) -> None:
    put(folder, "a.png")
    Image.new("L", (64, 64), "white").save(folder / "a.mask.png")
    (example,) = scanned(folder).train
    assert example.mask is not None
    blob(64, 64).save(folder / "a.mask.png")
    with pytest.raises(DataError, match=r"a\.mask\.png: the mask has changed since the run began"):
        masks.load(example.mask, example.bucket)


def test_each_folder_has_masks_of_its_own(folder: Path, tmp_path: Path) -> None:
    for name in ("images", "more", "masks", "more masks"):
        (tmp_path / name).mkdir(exist_ok=True)
    put(folder, "a.png", (48, 64))
    put(tmp_path / "more", "a.png")
    Image.new("L", (48, 64), 90).save(tmp_path / "masks" / "a.png")
    Image.new("L", (64, 64), 91).save(tmp_path / "more masks" / "a.png")
    folders = tuple(
        FolderConfig(images=str(tmp_path / images), masks=str(tmp_path / its), resolution=(64, 128))
        for images, its in (("images", "masks"), ("more", "more masks"))
    )
    config = DataConfig(folders=folders, default_caption="x", resolution=64)
    found = scan(config, multiple=16, seed=0).train
    assert [e.mask and e.mask.path.parent.name for e in found] == ["masks", "more masks"]
    with pytest.raises(DataError, match="the masks of each folder are named in its own table"):
        scan(replace(config, masks=str(tmp_path / "masks")), multiple=16, seed=0)
    mask = Image.new("L", (48, 64))
    mask.putpixel((0, 20), 20)  # what is left of it at 128 pixels is less than a half at 64
    mask.save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="is all black within the crop"):
        scan(config, multiple=16, seed=0)
