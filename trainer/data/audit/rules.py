"""The rules of an audit, as a user sets them in TOML. Pictures are held against them in `judge`."""

from dataclasses import dataclass, fields

DAMAGED = "damaged"
"""The rule that is always on: a picture that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a picture should be like. A limit that is never reached switches its rule off."""

    leave_out: tuple[str, ...] = (DAMAGED, "copies", "min_side")
    """The rules whose pictures are left out of training; those of the others are for you to look at. "damaged" are
    pictures that cannot be read."""
    min_side: int | None = None
    """The least pixels of the shorter side. By default half of `[data] resolution`."""
    max_crop: float = 0.25
    """The largest share of a picture, from 0 to 1, that the crop to its bucket may cut off."""
    max_enlargement: float = 1.5
    """The largest factor by which a picture may be scaled up to cover its bucket."""
    min_sharpness: float = 0.4
    """The least sharpness, from 0 to 1: 1 - the blur effect of the sharpest part. Blurred and enlarged pictures lie
    below."""
    min_lights: float = 0.25
    """The least luminance, from 0 to 1, that the brightest 2 % of a picture should reach. Dark pictures lie below."""
    max_shadows: float = 0.75
    """The largest luminance, from 0 to 1, above which the darkest 2 % of a picture should not lie. Overexposed pictures
    lie above."""
    min_contrast: float = 0.2
    """The least contrast, from 0 to 1: lights minus shadows, divided by their sum. Hazy pictures lie below."""
    max_flat: float = 0.95
    """The largest share of a picture, from 0 to 1, that may be without any detail. Empty pictures lie above."""
    copies: bool = True
    """Name all but one of the pictures that are the same to the pixel."""
    near_duplicates: float = 0.15
    """The share of the bits of two perceptual hashes, from 0 to 1, below which pictures count as near-duplicates: all
    but the best are named."""
    captions: bool = True
    """Name pictures without a caption, or with one that cannot be used."""
    trigger: bool = True
    """Name pictures whose caption lacks the trigger, where most captions have it."""
    same_captions: bool = True
    """Name pictures that share their caption with a picture that is not a copy."""
    one_script: bool = True
    """Name captions in another script, such as Chinese, than most captions have."""
    max_tokens: int | None = None
    """The largest number of tokens in a caption; they are counted where a base is given. By default what the text
    encoder reads."""
    max_faces: int = 1
    """The largest number of faces in a picture. This and the rules below need the extra `audit`."""
    max_people: int = 1
    """The largest number of people in a picture."""
    max_hands: int = 2
    """The largest number of hands in a picture."""
    max_texts: int = 0
    """The largest number of written lines in a picture, watermarks aside."""
    watermarks: bool = True
    """Name pictures with what seems to be a watermark: an address, a copyright sign, a picture agency, or the same line
    again and again."""

    def problems(self) -> list[str]:
        names = [DAMAGED, *(field.name for field in fields(self) if field.name != "leave_out")]
        found = [
            f'leave_out: "{name}" is no rule; rules are {", ".join(names)}'
            for name in self.leave_out
            if name not in names
        ]
        for name in (
            "max_crop", "min_sharpness", "min_lights", "max_shadows", "min_contrast", "max_flat", "near_duplicates",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} must be from 0 to 1")
        for name in ("min_side", "max_tokens", "max_faces", "max_people", "max_hands", "max_texts", "max_enlargement"):
            if (getattr(self, name) or 0) < 0:
                found.append(f"{name} must not be negative")
        return found
