"""Every picture is used as it is meant, or named; captions, buckets, split and batches follow their rules."""

import hashlib
import itertools
import json
import math
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.data.made import claiming, encoded, flipped, noise, png16, with_chunk
from trainer.data.dataset import DataConfig, Dataset, Example, _names, buckets, load_picture, scan
from trainer.data.epoch import batch, drops_caption
from trainer.data.pictures import DataError, open_picture


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def put(folder: Path, name: str, caption: str | None = "a caption", size: tuple[int, int] = (64, 64)) -> Path:
    """A picture of its own content for each name, with its caption."""
    path = folder / name
    noise(*size, seed=zlib.crc32(name.encode())).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def scanned(folder: Path, *, seed: int = 0, multiple: int = 16, resolution: int = 64, **settings) -> Dataset:
    return scan(DataConfig(images=str(folder), resolution=resolution, **settings), multiple=multiple, seed=seed)


def problems_of(folder: Path, **settings) -> list[str]:
    with pytest.raises(DataError) as caught:
        scanned(folder, **settings)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def note_on(dataset: Dataset, word: str) -> str:
    found = [note for note in dataset.notes if word in note]
    assert len(found) == 1, dataset.notes
    return found[0]


# --- pictures as people have them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"{}" * 40_000_000, 9)),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"{}" * 40_000_000, 9)),
        (b"iTXt", b"prompt"),
        (b"pHYs", b"1"),
        (b"gAMA", b""),
        (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    ],
    ids=["huge zTXt", "huge iTXt", "short iTXt", "short pHYs", "short gAMA", "bad eXIf"],
)
def test_what_a_png_says_beside_its_pixels_cannot_stop_it(folder, kind, data, recwarn):
    """ComfyUI writes its workflow there."""
    plain = encoded(noise(), "PNG")
    (folder / "a.png").write_bytes(with_chunk(plain, kind, data))
    (example,) = scanned(folder, default_caption="x").train
    assert np.array_equal(np.asarray(load_picture(example)), np.asarray(noise()))
    assert not [w for w in recwarn if "PIL" in str(w.filename)]


@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
def test_damaged_exif_data_do_not_stop_a_jpeg(folder, exif):
    (folder / "a.jpg").write_bytes(encoded(noise(), "JPEG", exif=exif))
    (example,) = scanned(folder, default_caption="x").train
    assert example.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("a.avif", "AVIF", {"quality": 100}),
        ("a.jfif", "JPEG", {"quality": 100}),
        ("a.jpe", "JPEG", {"quality": 100}),
        ("a.tif", "TIFF", {"compression": "tiff_lzw"}),
        ("a.TIFF", "TIFF", {}),
        ("a.heic", "HEIF", {"quality": 100}),
    ],
)
def test_less_common_kinds_of_pictures_are_read(folder, name, kind, options):
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    (folder / name).write_bytes(encoded(smooth, kind, **options))
    (example,) = scanned(folder, default_caption="x").train
    difference = np.asarray(load_picture(example), int) - np.asarray(smooth, int)
    assert np.abs(difference).mean() < 3


def test_heif_without_its_package_says_what_to_install(folder, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    (folder / "a.heic").write_bytes(encoded(noise(), "HEIF"))
    monkeypatch.setattr("trainer.data.pictures._reads_heif", lambda: False)
    monkeypatch.setattr("trainer.data.pictures.FORMATS", ("PNG", "JPEG"))
    (problem,) = problems_of(folder, default_caption="x")
    assert problem == (
        f'{folder / "a.heic"}: seems to be in HEIF; pip install -e ".[heif]" to read such pictures, or convert it'
    )


def test_further_pages_and_frames_are_named(folder):
    pages = [noise(seed=seed) for seed in range(3)]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "b.avif", save_all=True, append_images=pages[1:])
    dataset = scanned(folder, default_caption="x")
    assert "a.tif" in note_on(dataset, "several pages: only the first is used")
    assert "b.avif" in note_on(dataset, "animated: only the first frame is used")
    assert np.array_equal(np.asarray(load_picture(dataset.train[0])), np.asarray(pages[0]))


def test_floating_point_pixels_are_refused(folder):
    Image.fromarray(np.random.default_rng(0).random((64, 64), np.float32)).save(folder / "a.tif")
    (problem,) = problems_of(folder, default_caption="x")
    assert "floating-point" in problem and "save it with 8 or 16 bits" in problem


# --- bad pictures -----------------------------------------------------------------------------------------

BAD = {
    "empty.png": (b"", "is empty (0 bytes)"),
    "text.jpg": (b"this is not a picture", "is not a PNG, JPEG, WEBP, AVIF, TIFF, BMP or HEIF picture"),
    "gif.png": (encoded(Image.new("RGB", (8, 8)), "GIF"), "is not a PNG, JPEG, WEBP, AVIF, TIFF, BMP or HEIF picture"),
    "header.png": (encoded(noise(), "PNG")[:20], "; replace or remove it"),
    **{
        f"truncated.{kind.lower()}": (encoded(noise(), kind)[: -len(encoded(noise(), kind)) // 3], "is damaged")
        for kind in ("PNG", "JPEG", "WEBP", "BMP")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_cannot_be_used_is_a_problem_with_its_path(folder, name):
    content, expected = BAD[name]
    (folder / name).write_bytes(content)
    (problem,) = problems_of(folder, default_caption="x")
    assert problem.startswith(f"{folder / name}: ") and expected in problem
    with pytest.raises(DataError) as caught:
        open_picture(folder / name)
    assert caught.value.problems == [problem]


def test_a_damaged_checksum_is_found(folder):
    (folder / "a.png").write_bytes(flipped(encoded(noise(), "PNG")))
    (problem,) = problems_of(folder, default_caption="x")
    assert "a.png: is damaged" in problem


def test_every_bad_picture_is_listed_at_once_with_the_caption_problems(folder):
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("x")
    put(folder, "fine.png")
    put(folder, "mute.png", caption=None)
    found = problems_of(folder)
    assert len(found) == len(BAD) + 1
    for name in [*BAD, "mute.png"]:
        assert sum(problem.startswith(f"{folder / name}: ") for problem in found) == 1


def test_a_huge_picture_is_a_clear_problem(folder, monkeypatch):
    put(folder, "a.png", size=(64, 48))
    for limit in (64 * 48 - 1, 64 * 48 // 2 - 1):  # PIL warns above its limit, and raises above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        (problem,) = problems_of(folder)
        assert "a.png: is huge, more than" in problem and "make it smaller" in problem
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48)
    assert len(scanned(folder).train) == 1


def test_a_small_file_that_claims_a_huge_picture_is_not_unpacked(folder):
    (folder / "a.png").write_bytes(claiming(60_000, 60_000))
    (problem,) = problems_of(folder, default_caption="x")
    assert "is huge, more than 89 million pixels" in problem


def test_a_link_to_nothing_is_a_problem(folder):
    (folder / "a.png").symlink_to(folder / "gone.png")
    (problem,) = problems_of(folder, default_caption="x")
    assert "a.png: cannot be read" in problem


# --- pictures that need care ------------------------------------------------------------------------------


def test_a_plain_picture_is_not_changed(folder):
    for name in ("a.png", "a.bmp"):
        put(folder, name)
        assert np.array_equal(open_picture(folder / name), noise(seed=zlib.crc32(name.encode())))
    assert open_picture(folder / "a.png").mode == "RGB"
    assert [n for n in scanned(folder).notes if "one caption" not in n] == []


def test_exif_orientation_is_applied(folder):
    picture = Image.new("RGB", (48, 80), "blue")
    picture.paste("red", (0, 0, 48, 16))  # red at the top, as it is looked at
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.transpose(turn).save(folder / f"{orientation}.png", exif=exif)
        opened = open_picture(folder / f"{orientation}.png")
        assert opened.size == (48, 80) and np.array_equal(opened, picture)
    dataset = scanned(folder, default_caption="x")
    assert {(e.size, e.bucket) for e in dataset.train} == {((48, 80), (48, 80))}
    assert note_on(dataset, "turned upright").endswith("(3): 3.png, 6.png, 8.png")


def test_transparency_is_laid_over_white(folder):
    rgba = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 32, 64))
    rgba.paste((0, 0, 255, 128), (0, 0, 32, 32))
    rgba.save(folder / "rgba.png")
    rgba.save(folder / "rgba.webp", lossless=True)
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (32, 0, 64, 64))
    palette.save(folder / "palette.png", transparency=0)
    Image.new("LA", (64, 64), (0, 0)).save(folder / "grey.png")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "key.png", transparency=(1, 2, 3))
    for name in ("rgba.png", "rgba.webp", "palette.png"):
        opened = open_picture(folder / name)
        assert opened.mode == "RGB"
        assert opened.getpixel((10, 50)) == (255, 255, 255) and opened.getpixel((50, 50)) == (255, 0, 0), name
    assert open_picture(folder / "rgba.png").getpixel((10, 10)) == (127, 127, 255)
    assert open_picture(folder / "grey.png").getextrema() == ((255, 255),) * 3
    assert open_picture(folder / "key.png").getextrema() == ((255, 255),) * 3
    assert "(5)" in note_on(scanned(folder, default_caption="x"), "transparent: laid over white")


def test_an_alpha_channel_that_hides_nothing_is_not_worth_a_note(folder):
    noise().convert("RGBA").save(folder / "a.png")
    assert np.array_equal(open_picture(folder / "a.png"), noise())
    assert scanned(folder, default_caption="x").notes == ()


def test_16_bit_grey_is_scaled_not_clipped(folder):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(folder / "a.png")
    opened = np.asarray(open_picture(folder / "a.png"))
    assert np.abs(opened[..., 0] - values / 257.0).max() <= 0.5 + 1e-6
    assert np.array_equal(opened[..., 0], opened[..., 1]) and np.array_equal(opened[..., 0], opened[..., 2])
    assert "a.png" in note_on(scanned(folder, default_caption="x"), "from 16 to 8 bits")


def test_16_bit_colour_is_scaled_and_named(folder):
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, 3))
    (folder / "a.png").write_bytes(png16(values))
    assert np.abs(np.asarray(open_picture(folder / "a.png")) - values / 257).max() <= 1
    assert "a.png" in note_on(scanned(folder, default_caption="x"), "from 16 to 8 bits")


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_black_and_white_and_palette_become_rgb(folder, mode):
    grey = noise().convert(mode)
    grey.save(folder / "a.png")
    assert np.array_equal(open_picture(folder / "a.png"), grey.convert("RGB"))
    assert scanned(folder, default_caption="x").notes == ()


def test_cmyk_is_converted_and_named(folder):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(folder / "a.jpg", quality=95)
    red, green, blue = open_picture(folder / "a.jpg").getpixel((30, 30))
    assert red > 240 and green < 15 and blue < 15
    assert "a.jpg" in note_on(scanned(folder, default_caption="x"), "CMYK")


def test_colours_follow_an_embedded_profile(folder):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16be"), "tRGB".encode("utf-16be"))  # red means green, and back
    assert len(swapped) == len(srgb) and swapped != srgb
    Image.new("RGB", (64, 64), (200, 0, 0)).save(folder / "swapped.png", icc_profile=swapped)
    Image.new("RGB", (64, 64), (200, 1, 2)).save(folder / "srgb.png", icc_profile=srgb)
    Image.new("RGB", (64, 64), (200, 3, 4)).save(folder / "broken.png", icc_profile=b"not a profile")
    red, green, blue = open_picture(folder / "swapped.png").getpixel((0, 0))
    assert (red < 5, abs(green - 200) < 3, blue < 5) == (True, True, True)
    assert open_picture(folder / "srgb.png").getpixel((0, 0)) == (200, 1, 2)
    assert open_picture(folder / "broken.png").getpixel((0, 0)) == (200, 3, 4)
    dataset = scanned(folder, default_caption="x")
    assert note_on(dataset, "converted to sRGB").endswith(": swapped.png")
    assert note_on(dataset, "not usable").endswith(": broken.png")


def test_an_animation_gives_its_first_frame_and_a_note(folder):
    frames = [noise(seed=1), noise(seed=2)]
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(open_picture(folder / "a.webp"), frames[0])
    assert "a.webp" in note_on(scanned(folder, default_caption="x"), "animated")


def test_a_jpeg_with_a_preview_is_no_animation(folder):
    noise().save(folder / "a.jpg", "MPO", save_all=True, append_images=[noise(16, 16)])
    assert open_picture(folder / "a.jpg").size == (64, 64)
    assert scanned(folder, default_caption="x").notes == ()


def test_content_counts_not_the_suffix(folder):
    (folder / "a.JPG").write_bytes(encoded(noise(), "PNG"))
    assert np.array_equal(open_picture(folder / "a.JPG"), noise())
    assert len(scanned(folder, default_caption="x").train) == 1


# --- to the bucket ----------------------------------------------------------------------------------------


def test_a_picture_covers_its_bucket_and_keeps_its_centre(folder):
    wide = Image.new("RGB", (300, 100), "black")  # 3:1, into 80 x 48
    wide.paste("red", (0, 0, 50, 100))  # both ends fall away
    wide.paste("red", (250, 0, 300, 100))
    wide.paste("lime", (140, 40, 160, 60))
    wide.save(folder / "a.png")
    (example,) = (dataset := scanned(folder, default_caption="x")).train
    assert (example.size, example.bucket) == ((300, 100), (80, 48))
    loaded = np.asarray(load_picture(example)).astype(int)
    assert loaded.shape == (48, 80, 3)
    assert loaded[..., 0].max() < 60  # no red
    green = np.argwhere(loaded[..., 1] > 128)
    assert np.allclose(green.mean(0), [23.5, 39.5], atol=0.6)
    assert "a.png" in note_on(dataset, "cut off by the crop")


def test_a_picture_and_the_same_one_turned_have_the_same_bucket_turned(folder):
    """Ratios of sides are compared as factors: by their differences tall pictures would lie nearer to one another."""
    for side in range(40, 101, 3):
        put(folder, f"tall-{side:03}.png", size=(side, 100))
        put(folder, f"wide-{side:03}.png", size=(100, side))
    examples = scanned(folder).train
    tall, wide = ([e.bucket for e in examples if e.path.name.startswith(kind)] for kind in ("tall", "wide"))
    assert len(tall) == 21 and wide == [(height, width) for width, height in tall]
    assert set(tall) == {size for size in buckets(64, 16) if size[0] <= size[1]}


def test_a_picture_of_the_buckets_size_is_loaded_as_it_is(folder):
    put(folder, "a.png")
    dataset = scanned(folder)
    assert np.array_equal(load_picture(dataset.train[0]), noise(seed=zlib.crc32(b"a.png")))
    assert dataset.notes == ()


def test_upscaling_is_said(folder):
    put(folder, "small.png", size=(63, 63))
    put(folder, "low.png", size=(200, 40))
    put(folder, "large.png", size=(65, 65))
    note = note_on(scanned(folder), "upscaled")
    assert "small.png" in note and "low.png" in note and "large.png" not in note


def test_a_file_changed_after_the_scan_is_refused(folder):
    path = put(folder, "a.png")
    (example,) = scanned(folder).train
    noise(seed=123).save(path)
    with pytest.raises(DataError, match=r"a\.png: the file has changed"):
        load_picture(example)


@pytest.mark.parametrize("resolution, multiple", [(64, 16), (512, 16), (768, 32), (1024, 16), (1328, 16), (1024, 64)])
def test_buckets_have_the_area_the_multiple_and_both_orientations(resolution, multiple):
    found = buckets(resolution, multiple)
    assert len(found) >= 3 and len(set(found)) == len(found)
    assert any(w == h and abs(w - resolution) < multiple for w, h in found)
    for width, height in found:
        assert width % multiple == height % multiple == 0
        assert (height, width) in found
        assert abs(width * height / resolution**2 - 1) < max(0.5 * multiple / min(width, height), 0.02) + 1e-9
        assert max(width / height, height / width) <= 2.25
    assert found == sorted(found, key=lambda size: size[0] / size[1])


def test_buckets_reach_two_to_one_and_are_few(folder):
    found = buckets(1024, 16)
    assert max(w / h for w, h in found) >= 2 and min(w / h for w, h in found) <= 0.5
    assert 9 <= len(found) <= 15
    ratios = [w / h for w, h in found]
    assert max(b / a for a, b in itertools.pairwise(ratios)) < 1.25


def test_the_nearest_ratio_wins_measured_as_a_factor(folder):
    sizes = [(100, 100), (160, 90), (90, 160), (300, 200), (200, 300), (400, 50), (100, 109)]
    for i, size in enumerate(sizes):
        put(folder, f"{i}.png", size=size)
    options = buckets(1024, 16)
    examples = scanned(folder, resolution=1024).train
    assert [e.size for e in examples] == sizes
    for example in examples:
        distance = {o: abs(math.log(o[0] / o[1] * example.size[1] / example.size[0])) for o in options}
        assert distance[example.bucket] == min(distance.values())
    assert examples[0].bucket == (1024, 1024)
    assert examples[1].bucket == examples[2].bucket[::-1]


def test_a_resolution_off_the_multiple_is_a_problem_with_its_neighbours(folder):
    put(folder, "a.png")
    (problem,) = problems_of(folder, resolution=1000)
    assert problem == "resolution = 1000 must be a multiple of 16, such as 992 or 1008"


# --- captions ---------------------------------------------------------------------------------------------


def captions(dataset: Dataset) -> dict[str, str]:
    return {e.path.name: e.caption for e in (*dataset.train, *dataset.held_out)}


def test_captions_from_text_files_metadata_and_default(folder):
    put(folder, "a.png", caption=" from text \n")
    put(folder, "b.png", caption=None)
    put(folder, "c.png", caption=None)
    (folder / "metadata.jsonl").write_text('\n{"file_name": "./b.png", "text": "from metadata", "more": 1}\n\n')
    assert captions(scanned(folder, default_caption="default")) == {
        "a.png": "from text",
        "b.png": "from metadata",
        "c.png": "default",
    }


def test_a_picture_without_caption_is_a_problem_that_says_how_to_fix_it(folder):
    put(folder, "a.png", caption=None)
    (problem,) = problems_of(folder, trigger="zorp")
    assert problem.startswith(f"{folder / 'a.png'}: has no caption")
    for way in ("a.txt", "metadata.jsonl", 'default_caption, such as "zorp"'):
        assert way in problem


def test_two_different_captions_are_a_problem_and_two_equal_ones_are_not(folder):
    put(folder, "a.png", caption="one")
    row = {"file_name": "a.png", "text": "one "}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert captions(scanned(folder)) == {"a.png": "one"}
    row["text"] = "two"
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    (problem,) = problems_of(folder)
    assert "a.png: a.txt and metadata.jsonl line 1 give it different captions" in problem


def test_a_picture_named_twice_in_metadata_with_different_captions_is_a_problem(folder):
    put(folder, "a.png", caption=None)
    rows = [{"file_name": "a.png", "text": text} for text in ("one", "two")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (problem,) = problems_of(folder)
    assert "metadata.jsonl line 1 and metadata.jsonl line 2 give it different captions" in problem


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"file_name": "a.png", "text": "x"', "is not JSON ("),
        ("[1, 2]", 'must be like {"file_name"'),
        ('{"text": "x"}', 'must be like {"file_name"'),
        ('{"file_name": 5, "text": "x"}', 'must be like {"file_name"'),
        ('{"file_name": "gone.png", "text": "x"}', "there is no file gone.png in"),
        ('{"file_name": "notes.md", "text": "x"}', "notes.md is not one of .png"),
        ('{"file_name": "below/b.png", "text": "x"}', "below/b.png must lie directly in"),
        ('{"file_name": "a.png"}', 'a.png has no "text"'),
        ('{"file_name": "a.png", "text": null}', 'a.png has no "text"'),
        ('{"file_name": "a.png", "text": "  "}', 'a.png has no "text"'),
        ('{"file_name": "a.png", "text": "\udce9"}', "is not UTF-8"),
    ],
)
def test_a_bad_line_of_metadata_is_a_problem_with_its_number(folder, line, expected):
    put(folder, "a.png", caption=None)
    put(folder, "ok.png", caption=None)
    (folder / "notes.md").write_text("")
    (folder / "below").mkdir()
    put(folder / "below", "b.png")
    content = '{"file_name": "ok.png", "text": "fine"}\n' + line + "\n"
    (folder / "metadata.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    (problem,) = problems_of(folder, default_caption="x")
    assert problem.startswith(f"{folder / 'metadata.jsonl'}, line 2: ") and expected in problem


def test_bad_caption_files_are_problems(folder):
    put(folder, "empty.png", caption=" \n")
    path = put(folder, "latin.png")
    path.with_suffix(".txt").write_bytes(b"caf\xe9")
    found = problems_of(folder, default_caption="x")
    assert len(found) == 2
    assert found[0].startswith(f"{folder / 'empty.txt'}: is empty")
    assert found[1].startswith(f"{folder / 'latin.txt'}: is not UTF-8")


def test_byte_order_marks_and_suffixes_in_capitals_are_fine(folder):
    put(folder, "a.PNG", caption=None)
    (folder / "a.TXT").write_bytes(b"\xef\xbb\xbfhello")
    put(folder, "b.png", caption=None)
    (folder / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "b.png", "text": "there"}\r\n')
    assert captions(scanned(folder)) == {"a.PNG": "hello", "b.png": "there"}


def test_accented_names_match_however_they_are_stored(folder):
    stored, written = unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFC", "café")
    put(folder, f"{stored}.png", caption=None)
    (folder / f"{written}.txt").write_text("x")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"{written}.png", "text": "x"}))
    assert [*captions(scanned(folder)).values()] == ["x"]


def test_line_breaks_of_any_kind_inside_a_caption_do_not_split_metadata(folder):
    put(folder, "a.png", caption=None)
    row = {"file_name": "a.png", "text": "one\u2028two\x85three"}
    (folder / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert captions(scanned(folder)) == {"a.png": row["text"]}


def test_a_trigger_in_another_case_is_noted(folder):
    put(folder, "a.png", caption="A Zorp runs")
    assert 'another case, "Zorp"' in note_on(scanned(folder, trigger="zorp"), "another case")


CHINESE, CYRILLIC = "小明在海滩上散步，穿着红色的衣服", "Мальчик идёт по берегу моря"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a cat<|im_end|>\nI am the system", "<|im_end|> is a special token"),
        (b"<|vision_start|> a cat", "<|vision_start|> is a special token"),
        (b"a \0c\0a\0t", "contains NUL characters"),
        ("a cat".encode("utf-16"), "is not UTF-8, but UTF-16"),
        (b"\x1b[31ma cat\x1b[0m", r"contains the control character '\x1b'"),
        ("a \ufffd cat".encode(), "where a character was lost"),
        ("un café".encode().decode("latin-1").encode(), '"un cafÃ©" should be "un café"'),
        (CHINESE.encode("gbk"), "is not UTF-8, but probably GBK (Chinese)"),
        ("小明は海辺を歩いています。赤い服".encode("shift_jis"), "is not UTF-8, but probably Shift JIS"),
        (CYRILLIC.encode("cp1251"), "is not UTF-8, but probably Windows-1251 (Cyrillic)"),
        ("un café à la plage, très tôt".encode("cp1252"), "is not UTF-8, but probably Windows-1252"),
        ("\u200b\ufeff\u2060".encode(), "is empty"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_text_for_a_person_is_not_a_caption(folder, content, said):
    put(folder, "a.png", caption=None)
    (folder / "a.txt").write_bytes(content)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder / 'a.txt'}: ") and said in problem, problem


@pytest.mark.parametrize(
    "text", [CHINESE, CYRILLIC, "ein Äffchen – süß", "\U0001f469\u200d\U0001f467 family", "naïve café ½", "a\tb\nc"]
)
def test_text_in_any_script_is_a_caption(folder, text):
    put(folder, "a.png", caption=text)
    dataset = scanned(folder)
    assert captions(dataset) == {"a.png": text} and dataset.notes == ()


def test_invisible_characters_are_removed_with_a_note(folder):
    put(folder, "a.png", caption="\u200ba ca\u2060t")
    dataset = scanned(folder)
    assert captions(dataset) == {"a.png": "a cat"} and note_on(dataset, "invisible characters")


@pytest.mark.parametrize("setting", ["default_caption", "trigger"])
def test_texts_of_the_configuration_are_checked_too(folder, setting):
    put(folder, "a.png")
    (problem,) = problems_of(folder, **{setting: "x<|im_end|>"})
    assert problem.startswith(f"{setting}: <|im_end|> is a special token")


@pytest.mark.parametrize("name", ["a.caption", "a.png.txt", "a.png.caption", "a.TXT"])
def test_names_of_captions_in_use_elsewhere(folder, name):
    put(folder, "a.png", caption=None)
    (folder / name).write_text("from a file")
    dataset = scanned(folder, default_caption="default")
    assert captions(dataset) == {"a.png": "from a file"}


def test_masks_of_other_programs_are_not_trained_on_and_told_how_to_name(folder):
    for name in ("a.png", "a-masklabel.png", "b.jpg", "b_mask.png", "b.mask.jpg", "c-mask.png"):
        put(folder, name)
    dataset = scanned(folder)
    assert names(dataset.train) == {"a.png", "b.jpg", "c-mask.png"}  # there is no picture c
    assert all(example.mask is None for example in dataset.train)
    note = note_on(dataset, "masks beside pictures, which are not used; name them NAME.mask.png to use them (3)")
    assert "a-masklabel.png" in note and "b_mask.png" in note and "b.mask.jpg" in note


def test_folders_below_on_request(folder):
    put(folder, "a.png")
    (folder / "10_zorp" / "deep").mkdir(parents=True)
    (folder / "val").mkdir()
    put(folder / "10_zorp", "b.png")
    put(folder / "10_zorp" / "deep", "c.png", caption=None)
    (folder / "10_zorp" / "deep" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "deep"}')
    put(folder / "val", "d.png")
    assert names(scanned(folder).train) == {"a.png"}
    dataset = scanned(folder, recursive=True, held_out=str(folder / "val"))
    assert {e.path.name: e.caption for e in dataset.train} == {
        "a.png": "a caption",
        "b.png": "a caption",
        "c.png": "deep",
    }
    assert names(dataset.held_out) == {"d.png"}
    assert "10_zorp" in note_on(dataset, "means repeats in other trainers; here it does not")


def test_a_folder_that_holds_nothing_but_the_held_out_one_is_no_problem(folder):
    put(folder, "a.png")
    (folder / "more" / "val").mkdir(parents=True)
    put(folder / "more" / "val", "b.png")
    dataset = scanned(folder, recursive=True, held_out=str(folder / "more" / "val"))
    assert names(dataset.train) == {"a.png"} and names(dataset.held_out) == {"b.png"}


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("whole", [False, True], ids=["lines", "list"])
def test_metadata_as_others_write_it(folder, key, whole):
    put(folder, "a.png", caption=None)
    row = {"file_name": str(folder / "a.png"), key: "from metadata"}  # an absolute path inside the folder
    (folder / "metadata.jsonl").write_text(json.dumps([row] if whole else row, indent=1 if whole else None))
    assert captions(scanned(folder)) == {"a.png": "from metadata"}


def test_metadata_with_two_texts_or_a_broken_list_is_a_problem(folder):
    put(folder, "a.png", caption=None)
    file = folder / "metadata.jsonl"
    file.write_text(json.dumps({"file_name": "a.png", "text": "one", "prompt": "two"}))
    (problem,) = problems_of(folder)
    assert problem == f"{file}, line 1: a.png has different texts in text and prompt; keep one"
    file.write_text('[{"file_name": "a.png"')
    assert f"{file}: begins as a JSON list, but is not one" in problems_of(folder, default_caption="x")[0]


@pytest.mark.parametrize(
    "trigger, caption, expected",
    [
        ("zorp", "a creature", "zorp, a creature"),
        ("zorp", "a zorp, big", "a zorp, big"),
        ("zorp", "zorps and xzorp", "zorp, zorps and xzorp"),
        ("zorp", "zorp", "zorp"),
        ("big dog", "my big dog runs", "my big dog runs"),
        ("<s1>", "a <s1> cat", "a <s1> cat"),
        ("a.c", "abc", "a.c, abc"),
        ("zorp", "A [trigger] runs, the [Trigger]", "A zorp runs, the zorp"),
        ("zorp", "A Zorp runs", "A Zorp runs"),
        ("小明", "小明在海滩上散步", "小明在海滩上散步"),
        ("小明", "在海滩上散步", "小明, 在海滩上散步"),
        ("ヒロ", "これはヒロです", "これはヒロです"),
        ("", "abc", "abc"),
    ],
)
def test_the_trigger_stands_in_front_unless_the_caption_holds_it(folder, trigger, caption, expected):
    put(folder, "a.png", caption=caption)
    put(folder, "b.png", caption=None)
    assert captions(scanned(folder, trigger=trigger, default_caption=caption)) == {"a.png": expected, "b.png": expected}


# --- what lies in the folder ------------------------------------------------------------------------------


def test_other_files_are_noted_and_hidden_ones_ignored(folder):
    put(folder, "a.png")
    for name in ("b.psd", "notes.md", "other.jsonl", "orphan.txt", ".hidden.png", "._a.png", ".DS_Store"):
        (folder / name).write_bytes(b"junk")
    (folder / "nothing").mkdir()
    (folder / "more").mkdir()
    put(folder / "more", "c.png")
    dataset = scanned(folder)
    assert [e.path.name for e in dataset.train] == ["a.png"]
    note = note_on(dataset, "neither pictures nor captions")
    assert all(name in note for name in ("b.psd", "notes.md", "other.jsonl")) and "(3)" in note
    assert "orphan.txt" in note_on(dataset, "belong to no picture")
    assert str(folder / "more") in note_on(dataset, "without recursive = true")
    assert len(dataset.notes) == 3


def test_a_caption_shared_by_two_pictures_and_an_unneeded_default_are_noted(folder):
    put(folder, "a.png")
    put(folder, "a.jpg")
    dataset = scanned(folder, default_caption="unused")
    assert "a.txt for a.jpg, a.png" in note_on(dataset, "one caption for several pictures")
    assert note_on(dataset, "default_caption not needed")


def test_a_folder_without_pictures_is_a_problem(folder):
    (folder / "more").mkdir()
    put(folder / "more", "c.png")
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder}: there is no picture in it") and problem.endswith(
        "(more): set recursive = true to use them"
    )


def test_examples_come_in_order_of_name_with_digest_and_size(folder):
    for name in ("b.png", "a.png", "C.png"):
        put(folder, name, size=(70, 66))
    examples = scanned(folder).train
    assert [e.path for e in examples] == [folder / "C.png", folder / "a.png", folder / "b.png"]
    assert all(e.digest == hashlib.sha256(e.path.read_bytes()).hexdigest() for e in examples)
    assert {e.size for e in examples} == {(70, 66)}


def test_the_users_folder_is_only_read(folder):
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp"):
        put(folder, name, size=(90, 50))
    (folder / "more").mkdir()

    def state() -> dict[Path, tuple[int, bytes]]:
        return {p: (p.stat().st_mtime_ns, b"" if p.is_dir() else p.read_bytes()) for p in (folder, *folder.rglob("*"))}

    before = state()
    dataset = scanned(folder, held_out=1)
    for example in (*dataset.train, *dataset.held_out):
        load_picture(example)
    assert len(before) == 10 and state() == before


# --- the split --------------------------------------------------------------------------------------------


def names(examples: tuple[Example, ...]) -> set[str]:
    return {e.path.name for e in examples}


def test_a_number_of_pictures_is_held_out_by_seed(folder):
    for i in range(8):
        put(folder, f"{i}.png")
    dataset = scanned(folder, held_out=3)
    assert len(dataset.held_out) == 3 and len(dataset.train) == 5
    assert not names(dataset.train) & names(dataset.held_out)
    assert scanned(folder, held_out=3) == dataset
    assert len({frozenset(names(scanned(folder, held_out=3, seed=s).held_out)) for s in range(8)}) > 3
    assert names(scanned(folder, held_out=2).held_out) < names(dataset.held_out)
    for i in range(8):  # new names change neither side
        for suffix in ("png", "txt"):
            (folder / f"{i}.{suffix}").rename(folder / f"z{7 - i}.{suffix}")
    assert {e.digest for e in scanned(folder, held_out=3).held_out} == {e.digest for e in dataset.held_out}


def test_something_must_be_left_to_train_on(folder):
    for i in range(3):
        put(folder, f"{i}.png")
    assert len(scanned(folder, held_out=2).train) == 1
    for count in (3, 4):
        (problem,) = problems_of(folder, held_out=count)
        assert f"held_out = {count} leaves nothing to train on: there are 3 pictures" in problem


def test_copies_are_noted_and_never_held_out(folder):
    for name in ("a", "b", "c"):
        put(folder, f"{name}.png")
    for copy in ("a2", "b2"):
        (folder / f"{copy}.png").write_bytes((folder / f"{copy[0]}.png").read_bytes())
        (folder / f"{copy}.txt").write_text("a caption")
    for seed in range(6):
        dataset = scanned(folder, held_out=1, seed=seed)
        assert names(dataset.held_out) == {"c.png"}
    note = note_on(dataset, "more than once")
    assert "a.png = a2.png" in note and "b.png = b2.png" in note
    (problem,) = problems_of(folder, held_out=2)
    assert "held_out = 2: only 1 of 5 pictures have no copy" in problem


def test_copies_in_other_files_and_choices_of_captions_are_told_apart(folder):
    picture = noise()
    for name in ("a", "b"):
        picture.save(folder / f"{name}.png", compress_level=9 if name == "a" else 1)
        (folder / f"{name}.txt").write_text("the same")
    assert "a.png = b.png" in note_on(scanned(folder), "copies of a picture in other files")
    (folder / "b.txt").write_text("another")
    assert "a.png = b.png" in note_on(scanned(folder), "different captions: each counts as a picture")
    put(folder, "c.png")
    assert names(scanned(folder, held_out=1).held_out) == {"c.png"}


def test_a_folder_of_its_own_is_held_out_even_inside_the_other(folder):
    (folder / "val").mkdir()
    put(folder, "a.png")
    put(folder / "val", "b.png", caption="held")
    dataset = scanned(folder, held_out=str(folder / "val"))
    assert names(dataset.train) == {"a.png"} and names(dataset.held_out) == {"b.png"}
    assert dataset.held_out[0].caption == "held" and dataset.notes == ()


def test_a_held_out_picture_that_is_also_trained_on_is_a_problem(folder, tmp_path):
    (tmp_path / "val").mkdir()
    put(folder, "a.png")
    put(tmp_path / "val", "b.png").write_bytes((folder / "a.png").read_bytes())
    (problem,) = problems_of(folder, held_out=str(tmp_path / "val"))
    assert problem.startswith(f"{tmp_path / 'val' / 'b.png'}: is held out, but {folder / 'a.png'} is the same picture")


def test_problems_of_both_folders_come_together(folder, tmp_path):
    (tmp_path / "val").mkdir()
    (folder / "a.png").write_bytes(b"")
    (tmp_path / "val" / "b.png").write_bytes(b"")
    found = problems_of(folder, held_out=str(tmp_path / "val"), default_caption="x")
    assert ["a.png" in found[0], "b.png" in found[1], len(found)] == [True, True, 2]


# --- configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"images": "no/such"}, "images: there is no folder"),
        ({"images": ""}, "images must name a folder"),
        ({"held_out": -1}, "held_out must not be negative"),
        ({"held_out": "no/such"}, "held_out: there is no folder"),
        ({"held_out": ""}, "held_out: there is no folder"),
        ({"held_out": "{folder}/"}, "held_out is the same folder as images"),
        ({"resolution": 8}, "resolution must be at least 16"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1"),
        ({"caption_dropout": -0.1}, "caption_dropout must be from 0 to 1"),
        ({"trigger": " zorp"}, "trigger must not begin or end with a space"),
        ({"cache": ""}, "cache must name a folder"),
    ],
)
def test_impossible_settings_are_problems(folder, settings, expected):
    settings = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in settings.items()}
    config = DataConfig(**{"images": str(folder), **settings})
    (problem,) = config.problems()
    assert problem.startswith(expected)
    with pytest.raises(DataError) as caught:
        scan(config, multiple=16, seed=0)
    assert problem in caught.value.problems


def test_good_settings_have_no_problems(folder):
    (folder / "val").mkdir()
    assert DataConfig(images=str(folder)).problems() == []
    assert DataConfig(images=str(folder), held_out=str(folder / "val"), caption_dropout=1.0).problems() == []


# --- batches ----------------------------------------------------------------------------------------------


def made_up(**counts: int) -> tuple[Example, ...]:
    sizes = {"tall": (48, 80), "square": (64, 64), "wide": (80, 48)}
    return tuple(
        Example(Path(f"{kind}{i}.png"), "", f"{kind}{i}", sizes[kind], sizes[kind], f"{kind}{i}")
        for kind, count in counts.items()
        for i in range(count)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("counts", [{"square": 7}, {"tall": 1, "square": 6, "wide": 5}, {"wide": 1}])
def test_each_epoch_shows_every_picture_in_batches_of_one_bucket(batch_size, counts):
    examples = made_up(**counts)
    per_epoch = sum(math.ceil(count / batch_size) for count in counts.values())
    for epoch in range(4):
        seen: Counter[Example] = Counter()
        for index in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            dealt = batch(examples, batch_size, seed=3, index=index)
            assert len(dealt) == batch_size and len({e.bucket for e in dealt}) == 1
            seen.update(dealt)
        assert set(seen) == set(examples)
        for kind, count in counts.items():  # only the filling of a bucket's last batch shows a picture again
            times = [n for e, n in seen.items() if e.path.name.startswith(kind)]
            assert sum(times) == math.ceil(count / batch_size) * batch_size
            assert max(times) - min(times) <= 1


def test_filling_takes_other_members_before_any_is_repeated_in_a_batch():
    examples = made_up(square=5)
    for index in range(30):
        dealt = batch(examples, 3, seed=0, index=index)
        assert len(set(dealt)) == 3


def test_a_batch_depends_on_seed_and_index_alone():
    examples = made_up(tall=5, square=9)
    sequence = [batch(examples, 2, seed=1, index=i) for i in range(40)]
    assert [batch(examples, 2, seed=1, index=i) for i in reversed(range(40))] == sequence[::-1]
    assert [batch(examples, 2, seed=2, index=i) for i in range(40)] != sequence
    assert sequence[:8] != sequence[8:16]  # another epoch, another order
    kinds = ["".join(b[0].path.name[0] for b in sequence[i : i + 8]) for i in range(0, 40, 8)]
    assert len(set(kinds)) > 1  # buckets take turns differently
    partners = [{frozenset(e.digest for e in dealt) for dealt in sequence[i : i + 8]} for i in range(0, 40, 8)]
    assert len({frozenset(epoch) for epoch in partners}) > 1  # and so do pictures within their bucket


def test_batches_leave_global_randomness_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    batch(made_up(square=5), 2, seed=0, index=0)
    drops_caption(0.5, seed=0, index=0, position=0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("examples, batch_size, index", [((), 1, 0), (made_up(wide=1), 0, 0), (made_up(wide=1), 1, -1)])
def test_a_batch_of_nothing_is_refused(examples, batch_size, index):
    with pytest.raises(ValueError, match="no batch"):
        batch(examples, batch_size, seed=0, index=index)


def test_captions_are_dropped_at_the_rate_asked_for_and_always_the_same_ones():
    places = [(index, position) for index in range(250) for position in range(4)]

    def dropped(rate: float, seed: int = 0) -> list[bool]:
        return [drops_caption(rate, seed=seed, index=i, position=p) for i, p in places]

    assert not any(dropped(0.0)) and all(dropped(1.0))
    some = dropped(0.1)
    assert 60 < sum(some) < 140 and dropped(0.1) == some and dropped(0.1, seed=1) != some
    assert [some[p::4] for p in range(4)] != [some[::4]] * 4  # each position has its own chance
    assert all(more for less, more in zip(some, dropped(0.3), strict=True) if less)


def test_pictures_of_one_name_are_called_by_their_folders_too(tmp_path):
    paths = [
        tmp_path / "a" / "1.png",
        tmp_path / "b" / "1.png",
        tmp_path / "b" / "2.png",
        tmp_path / "c" / "b" / "1.png",
    ]
    names = _names(paths)
    assert [*names.values()] == ["a/1.png", str(paths[1]), "2.png", str(paths[3])]
