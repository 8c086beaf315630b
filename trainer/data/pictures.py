"""One picture, from a file to 8-bit sRGB, upright; or a clear error that says why it cannot be used."""

import io
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content; a picture may carry another one's suffix
_opening = threading.Lock()  # PIL's limit on pixels warns, and warnings are caught for the whole process


class DataError(ValueError):
    """All that is wrong with the pictures and captions, one problem a line."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)  # so that it survives the way out of a worker process


def open_picture(path: Path) -> Image.Image:
    """The whole picture in 8-bit sRGB, upright, transparency over white. DataError if it cannot be used."""
    return decode(path, read(path))[0]


def read(path: Path) -> bytes:
    """The file's bytes, for a digest and for `decode`. DataError if it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError([f"{path}: cannot be read ({error.strerror})"]) from error
    if not data:
        raise DataError([f"{path}: is empty (0 bytes); replace or remove it"])
    return data


def decode(path: Path, data: bytes) -> tuple[Image.Image, list[str]]:
    """The picture in RGB, and what had to be done to it, for a note. DataError if it cannot be used."""
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        return _to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
        raise DataError([f"{path}: is huge, more than {limit} pixels; make it smaller"]) from error
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]
        raise DataError([f"{path}: holds no {kinds} picture; convert, replace or remove it"]) from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, zlib.error, ...
        raise DataError([f"{path}: is damaged ({error}); replace or remove it"]) from error


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    done = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a JPEG with previews is no animation
        done.append("animated: only the first frame is used")
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    profile = image.info.get("icc_profile")
    image.load()
    if image.getexif().get(0x0112, 1) in range(2, 9):
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
            done.append("transparent: laid over white")
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


def pictures_in(folder: Path) -> list[Path]:
    """Files of a folder that are pictures by their suffix, hidden ones aside, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
