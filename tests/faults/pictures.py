"""Kinds of picture: each is used as it is meant, with a word on what was done to it, or refused by its name."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from tests.data.made import claiming, encoded, flipped, noise, png16, with_chunk
from tests.faults.table import Fault
from tests.faults.world import Outcome, no_model_loads, patched, run
from tests.helpers import BAD_INPUT, FINISHED
from trainer import plan_words
from trainer.data import pictures

KIND = "a picture"
Maker = Callable[[Path], object]


def _scan(name: str, make: Maker) -> Outcome:
    """Put the picture among the others and look at the plan, which reads them all."""
    make(Path("pictures") / name)
    (Path("pictures") / name).with_suffix(".txt").write_text("a creature")
    with no_model_loads(), patched(plan_words, "memory_lines", lambda _: []):
        done = run("run.toml", "output=new", plan=True)
    return Outcome(done.code, done.message.replace("note         ", ""))


def _content(data: Callable[[], bytes]) -> Maker:
    return lambda path: path.write_bytes(data())


def _picture(kind: str, make: Callable[[], Image.Image] = noise, **options: object) -> Maker:
    return lambda path: path.write_bytes(encoded(make(), kind, **options))


def _cut(kind: str) -> Maker:
    return lambda path: path.write_bytes(encoded(noise(), kind)[: -len(encoded(noise(), kind)) // 3])


def _frames(kind: str) -> Maker:
    frames = [noise(seed=seed) for seed in range(2)]
    return lambda path: frames[0].save(path, kind, save_all=True, append_images=frames[1:])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _palette() -> Image.Image:
    picture = Image.new("P", (64, 64), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.paste(1, (32, 0, 64, 64))
    return picture


def _wide_gamut() -> bytes:
    """sRGB's profile with red and green exchanged, under another name."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    return swapped.replace("sRGB".encode("utf-16be"), "tRGB".encode("utf-16be"))


def _grey(kind: type) -> Image.Image:
    most = 1.0 if kind is np.float32 else np.iinfo(kind).max
    return Image.fromarray(np.linspace(0, most, 64 * 64).astype(kind).reshape(64, 64))


def _no_rights(name: str) -> Outcome:
    """Root may read all: this is the same for everybody."""
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with patched(Path, "read_bytes", read_bytes):
        return _scan(name, lambda path: Path(path).open("wb").write(encoded(noise(), "PNG")))


def _pipe_beside(name: str) -> Outcome:
    """A pipe in the place of a text file."""
    (Path("pictures") / name).unlink(missing_ok=True)
    os.mkfifo(Path("pictures") / name)
    return _scan("new.png", _picture("PNG"))


def _without_heif(name: str) -> Outcome:
    """As if the optional package were not installed."""
    data = b"\0\0\0\x18ftypheic" + bytes(64)
    with patched(pictures, "_reads_heif", lambda: False):
        return _scan(name, lambda path: path.write_bytes(data))


_Row = tuple[str, str, Maker, str]
REFUSED: list[_Row] = [
    ("no bytes", "new.png", _content(bytes), "is empty (0 bytes); replace or remove it"),
    ("a PNG cut short", "new.png", _cut("PNG"), "is damaged"),
    ("a JPEG cut short", "new.jpg", _cut("JPEG"), "is damaged"),
    ("a WebP cut short", "new.webp", _cut("WEBP"), "is damaged"),
    ("a BMP cut short", "new.bmp", _cut("BMP"), "is damaged"),
    ("a TIFF cut short", "new.tif", _cut("TIFF"), "is damaged"),
    ("only the header of a PNG", "new.png", _content(lambda: encoded(noise(), "PNG")[:20]), "replace or remove it"),
    ("a flipped byte in a PNG", "new.png", _content(lambda: flipped(encoded(noise(), "PNG"))), "is damaged"),
    ("text, renamed to .png", "new.png", _content(lambda: b"this is no picture"), "is not a PNG, JPEG"),
    ("a GIF, renamed to .png", "new.png", _picture("GIF"), "convert, replace or remove it"),
    ("floating-point pixels", "new.tif", _picture("TIFF", lambda: _grey(np.float32)), "save it with 8 or 16 bits"),
    ("32-bit pixels", "new.tif", _picture("TIFF", lambda: _grey(np.int32)), "save it with 8 or 16 bits"),
    (
        "few bytes that claim 60,000 x 60,000 pixels",
        "new.png",
        _content(lambda: claiming(60_000, 60_000)),
        "is huge, more than 89 million pixels; make it smaller",
    ),
    ("a link to nothing", "new.png", lambda path: path.symlink_to("gone.png"), "cannot be read"),
    ("a link to itself", "new.png", lambda path: path.symlink_to(path.name), "cannot be read"),
    ("a pipe", "new.png", lambda path: os.mkfifo(path), "is not a file"),
]
USED: list[_Row] = [
    ("a PNG, renamed to .jpg", "new.jpg", _picture("PNG"), ""),
    ("grey", "new.png", _picture("PNG", lambda: noise().convert("L")), ""),
    ("black and white", "new.png", _picture("PNG", lambda: noise().convert("1")), ""),
    ("grey with transparency", "new.png", _picture("PNG", lambda: Image.new("LA", (64, 64), (9, 9))), "over white"),
    ("transparent", "new.png", _picture("PNG", lambda: Image.new("RGBA", (64, 64), (9, 9, 9, 9))), "over white"),
    ("a palette with transparency", "new.png", _picture("PNG", _palette, transparency=0), "laid over white"),
    ("16-bit grey", "new.png", _picture("PNG", lambda: _grey(np.uint16)), "from 16 to 8 bits"),
    ("16-bit colour", "new.png", _content(lambda: png16(np.full((64, 64, 3), 9000))), "from 16 to 8 bits"),
    ("CMYK", "new.jpg", _picture("JPEG", lambda: Image.new("CMYK", (64, 64), (0, 255, 255, 0))), "converted from CMYK"),
    ("turned by its EXIF data", "new.jpg", _picture("JPEG", exif=_exif(6)), "turned upright"),
    ("damaged EXIF data", "new.jpg", _picture("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), ""),
    ("an animated WebP", "new.webp", _frames("WEBP"), "only the first frame is used"),
    ("an animated AVIF", "new.avif", _frames("AVIF"), "only the first frame is used"),
    ("a TIFF of several pages", "new.tif", _frames("TIFF"), "only the first is used"),
    ("a JPEG with a preview (MPO)", "new.jpg", _frames("MPO"), ""),
    ("an AVIF", "new.avif", _picture("AVIF"), ""),
    (
        "a PNG with 80 MB of text in it",
        "new.png",
        _content(lambda: with_chunk(encoded(noise(), "PNG"), b"zTXt", b"workflow\0\0" + _packed())),
        "metadata that cannot be read",
    ),
    ("an ICC profile that is none", "new.png", _picture("PNG", icc_profile=b"not a profile"), "taken as sRGB"),
    (
        "an ICC profile of other colours",
        "new.png",
        _picture("PNG", icc_profile=_wide_gamut()),
        "converted to sRGB from their own profile",
    ),
    ("1 x 1 pixel", "new.png", _picture("PNG", lambda: noise(1, 1)), "upscaled and soft"),
    ("20,000 x 8 pixels", "new.png", _picture("PNG", lambda: noise(20_000, 8)), "cut off by the crop"),
    ("a folder with the name of a picture", "new.png", lambda path: path.mkdir(), "belong to no picture"),
    ("a copy of another picture", "new.png", lambda path: path.write_bytes(_other(path)), "each counts as a picture"),
]


@functools.cache
def _packed() -> bytes:
    import zlib

    return zlib.compress(b"{}" * 40_000_000, 9)


def _other(path: Path) -> bytes:
    """A training picture."""
    return path.with_name("1.png").read_bytes()


def _fault(row: _Row, code: int) -> Fault:
    what, name, make, says = row
    return Fault(KIND, what, functools.partial(_scan, name, make), code, says, stable=True, posix=what == "a pipe")


FAULTS = [
    *(_fault(row, BAD_INPUT) for row in REFUSED),
    Fault(
        KIND, "no right to read it", functools.partial(_no_rights, "new.png"), BAD_INPUT, "cannot be read",
        stable=True,
    ),
    Fault(
        KIND, "HEIF without its package", functools.partial(_without_heif, "new.heic"), BAD_INPUT, "pip install",
        stable=True,
    ),
    *(
        Fault(KIND, f"a pipe for {what}", functools.partial(_pipe_beside, name), BAD_INPUT, f"{name}: is not a file",
              stable=True, posix=True)
        for what, name in (("a caption", "1.txt"), ("metadata.jsonl", "metadata.jsonl"))
    ),
    *(_fault(row, FINISHED) for row in USED),
]  # fmt: skip
