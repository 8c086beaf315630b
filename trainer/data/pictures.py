"""One picture, from a file to 8-bit sRGB, upright; or a clear error that says why it cannot be used."""

import hashlib
import io
import threading
import warnings
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from trainer.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "HEIF")
"""By content: a picture may carry another one's suffix. HEIF needs an optional package."""
NEEDED_CHUNKS = (
    b"IHDR",
    b"PLTE",
    b"tRNS",
    b"IDAT",
    b"IEND",
    b"acTL",
    b"iCCP",
    b"sRGB",
)  # of a PNG: what makes its pixels
PNG = b"\x89PNG\r\n\x1a\n"
TRANSPARENT = "transparent: laid over white"  # what `decode` says that it has done
_warnings = threading.Lock()  # what is done with warnings holds for the whole process, whatever the thread


class DataError(UserError):
    """All that is wrong with the pictures and captions, one problem a line."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)  # so that it survives the way out of a worker process


def open_picture(path: Path) -> Image.Image:
    """The whole picture in 8-bit sRGB, upright, transparency over white. DataError if it cannot be used."""
    return decode(path, read(path))[0]


def upright(image: Image.Image, name: str) -> Image.Image:
    """What `open_picture` makes of the same picture in a file. `name`: what an error calls it. DataError as there."""
    try:
        made = _to_rgb(image)[0].copy()
    except Exception as error:  # it may be read only now: decoders raise many kinds
        raise DataError([f"{name}: cannot be used ({error}); replace or remove it"]) from error
    made.info.clear()  # a profile that is applied already must not be applied again
    return made


def read(path: Path) -> bytes:
    """The file's bytes, for a digest and for `decode`. DataError if it cannot be read or is empty."""
    if problem := no_file(path):
        raise DataError([f"{path}: {problem}"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError([f"{path}: cannot be read ({error.strerror})"]) from error
    if not data:
        raise DataError([f"{path}: is empty (0 bytes); replace or remove it"])
    return data


def no_file(path: Path) -> str:
    """What is wrong with a path that has content without being a file: reading a pipe would never end."""
    if path.exists() and not path.is_file():
        return "is not a file that can be read, but a pipe, a device or a folder; remove it"
    return ""


def decode(path: Path, data: bytes) -> tuple[Image.Image, list[str]]:
    """The picture in RGB, and what had to be done to it, for a note. DataError if it cannot be used."""
    done: list[str] = []
    if data.startswith(PNG) and (short := _only_pixels(data)) != data:
        try:
            return _open(path, data)
        except DataError:  # its texts may be the reason: ComfyUI writes whole workflows into them
            data, done = short, ["metadata that cannot be read, and are not needed"]
    image, more = _open(path, data)
    return image, [*done, *more]


def _open(path: Path, data: bytes) -> tuple[Image.Image, list[str]]:
    try:
        with _warnings, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in _known()])
        return _to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
        raise DataError([f"{path}: is huge, more than {limit} pixels; make it smaller"]) from error
    except Image.UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and not _reads_heif():
            advice = 'pip install -e ".[heif]" to read such pictures, or convert it'
            raise DataError([f"{path}: seems to be in HEIF; {advice}"]) from error
        kinds = ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]
        raise DataError([f"{path}: is not a {kinds} picture; convert, replace or remove it"]) from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, zlib.error, ...
        raise DataError([f"{path}: is damaged ({error}); replace or remove it"]) from error


@cache
def _reads_heif() -> bool:
    """Whether the optional package for HEIF is here; PIL then knows the format."""
    try:
        import pillow_heif  # an extra
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _known() -> Collection[str]:
    """The formats that PIL can read here."""
    _reads_heif()
    Image.init()
    return Image.OPEN


def _only_pixels(data: bytes) -> bytes:
    """A PNG without the chunks that say nothing of its pixels."""
    kept, at = [PNG], len(PNG)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in NEEDED_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    done = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a JPEG with previews has no further pictures
        pages = image.format == "TIFF"
        done.append("several pages: only the first is used" if pages else "animated: only the first frame is used")
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    profile = image.info.get("icc_profile")
    image.load()
    if image.mode == "F" or (image.mode == "I" and not deep):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UserError(f"pixels are {kind} numbers, of which the range is not known; save it with 8 or 16 bits")
    if _orientation(image) in range(2, 9):
        done.append("turned upright, as their EXIF data say")
        image = ImageOps.exif_transpose(image)
    if deep or image.mode.startswith("I"):
        done.append("converted from 16 to 8 bits")
    if image.mode.startswith("I"):  # PIL would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] != 255:
            done.append(TRANSPARENT)
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = rgba
    if image.mode in ("P", "RGBA"):
        image = image.convert("RGB")
    if image.mode == "CMYK":
        done.append("converted from CMYK")
    if profile and image.mode in ("RGB", "CMYK"):
        image, word = _to_srgb(image, profile)
        done += [word] if word else []
    return image.convert("RGB"), done


def _orientation(image: Image.Image) -> int:
    """What the EXIF data say; 1, upright, if there are none or they are damaged."""
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(image.getexif().get(0x0112, 1))
        except Exception:  # damaged EXIF data make decoders raise many kinds
            return 1


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Colours as the embedded ICC profile means them: without it, wide-gamut photographs turn pale."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image, ""
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image, "colour profile not usable: colours taken as sRGB"
    assert made is not None  # it is only None when converting in place
    return made, "colours converted to sRGB from their own profile"


def fitted(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """A picture, or its mask, at its bucket's size: scaled to cover it, the centre kept."""
    return ImageOps.fit(image, bucket, Image.Resampling.LANCZOS)


def pixel_hash(image: Image.Image) -> str:
    """sha256 of size and pixels, in hex: the same for copies that differ in their bytes only."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def grey_pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> tuple[Path, ...]:
    """Write a picture of mid-grey (128) into `folder` for each width and height."""
    paths = tuple(folder / f"grey-{number}.png" for number in range(len(sizes)))
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, (128, 128, 128)).save(path)
    return paths


def pictures_in(folder: Path) -> list[Path]:
    """Files of a folder that are pictures by their suffix, hidden ones aside, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
