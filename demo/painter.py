"""Paint cartoon creatures: a picture is made from who is shown (`Identity`) and in which scene (`Scene`).

Everything is drawn from signed distance fields on a 64x64 grid, about 1 ms a picture, and is a pure function of its
arguments. Identities come in tiers with disjoint seeds, so that no creature of pretraining or hypernetwork training can
be a held-out subject:

    pretrain  seeds         0 ..   999,999   every trait of the world
    hyper     seeds 1,000,000 .. 1,999,999   no trait of `TRAIT_ONLY`
    new       seeds 2,000,000 .. 2,999,999   held out; the traits of `hyper`
    trait     seeds 3,000,000 .. 3,999,999   held out; all with horns, every second one with spots
    foreign   seeds 4,000,000 .. 4,999,999   held out; features that no training has shown
"""

import colorsys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels
SHIFT = 0.5  # pixels to each side, by which creatures in equal scenes differ
Tier = Literal["pretrain", "hyper", "new", "trait", "foreign"]
TIERS: tuple[Tier, ...] = ("pretrain", "hyper", "new", "trait", "foreign")
TIER_SEEDS = 1_000_000  # identities reserved for each tier

SHAPES = ("round", "square", "tall", "wide", "pear")
PATTERNS = ("plain", "stripes", "spots", "bands", "patches")
HEADGEAR = ("nothing", "ears", "horns", "hat", "antenna")
HUES = {
    "red": 0.99,
    "orange": 0.07,
    "yellow": 0.145,
    "green": 0.32,
    "teal": 0.48,
    "blue": 0.60,
    "purple": 0.75,
    "pink": 0.89,
}
BACKGROUNDS = {
    "meadow": "in a meadow",
    "night": "at night",
    "beach": "on the beach",
    "snow": "in the snow",
    "room": "in a room",
}
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
SIZES = ("small", "big")
NAMES = ("zorp", "milo", "kiki", "bobo", "luma", "tuck", "nori", "fizz", "gogo", "pim", "wanda", "yuki")

TRAIT_ONLY = {"headgear": "horns", "pattern": "spots"}
FOREIGN = {"shape": "triangle", "pattern": "checkered", "headgear": "bow", "num_eyes": 1, "eye_colour": "yellow"}
_NUMBER_WORDS = {1: "one eye", 2: "two eyes", 3: "three eyes"}

Image = NDArray[np.uint8]
Field = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a creature looks like, the same in every scene. Hues have names, but each creature has its own shade."""

    shape: str
    colour: str
    pattern: str
    pattern_colour: str
    headgear: str
    headgear_colour: str
    num_eyes: int
    belly: bool
    eye_colour: str = "black"
    shade: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Shift of hue, saturation and value, each in [-1, 1]."""
    patch_side: int = 1
    """Side of the patch in the pattern "patches": -1 left, 1 right."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Background, place and size. `seed` fixes small shifts, and the side of the background's sun, cloud or window."""

    background: str
    place: str
    size: str
    seed: int


def identity(tier: Tier, index: int) -> Identity:
    """Creature `index` of a tier; ValueError if the tier is unknown or has no such index."""
    if tier not in TIERS or not 0 <= index < TIER_SEEDS:
        raise ValueError(f"tier {tier!r}, index {index}: expected one of {TIERS} and 0 <= index < {TIER_SEEDS}")
    rng = np.random.default_rng(TIERS.index(tier) * TIER_SEEDS + index)
    pick = lambda options: str(rng.choice([*options]))  # noqa: E731
    shape, colour = pick(SHAPES), pick(HUES)
    pattern = pick(PATTERNS if tier == "pretrain" else [p for p in PATTERNS if p != TRAIT_ONLY["pattern"]])
    headgear = pick(HEADGEAR if tier == "pretrain" else [h for h in HEADGEAR if h != TRAIT_ONLY["headgear"]])
    num_eyes, eye_colour = int(rng.integers(1, 4)), "black"
    if tier == "trait":
        headgear = TRAIT_ONLY["headgear"]
        pattern = TRAIT_ONLY["pattern"] if index % 2 == 0 else pattern
    if tier == "foreign":
        shape, pattern, headgear = FOREIGN["shape"], FOREIGN["pattern"], FOREIGN["headgear"]  # type: ignore[assignment]
        num_eyes, eye_colour = 1, "yellow"
    return Identity(
        shape=shape,
        colour=colour,
        pattern=pattern,
        pattern_colour=pick([h for h in HUES if h != colour]),
        headgear=headgear,
        headgear_colour=pick([h for h in HUES if h != colour]),
        num_eyes=num_eyes,
        belly=bool(rng.integers(2)),
        eye_colour=eye_colour,
        shade=tuple(rng.uniform(-1, 1, 3)),
        patch_side=int(rng.choice([-1, 1])),
    )


def scene(seed: int) -> Scene:
    """A scene drawn from its seed; scenes 0..29 hold each background, place and size once."""
    if seed < 30:
        order = np.random.default_rng(30).permutation(30)[seed]
        background, place, size = order % 5, order // 5 % 3, order // 15
    else:
        background, place, size = np.random.default_rng(seed).integers([5, 3, 2])
    return Scene(background=[*BACKGROUNDS][background], place=[*PLACES][place], size=SIZES[size], seed=seed)


def caption(where: Scene, who: Identity | None = None, name: str | None = None) -> str:
    """The scene in words. With `who`, the creature's traits are named too; with `name`, that name comes first."""
    subject = f"a {where.size} creature"
    if who is not None:
        subject = f"a {where.size} {who.colour} {who.shape} creature with {_NUMBER_WORDS[who.num_eyes]}"
        subject += "" if who.pattern == "plain" else f", {who.pattern_colour} {who.pattern}"
        subject += "" if who.headgear == "nothing" else f", {who.headgear_colour} {who.headgear}"
        subject += ", a pale belly" if who.belly else ""
    text = f"{subject} {PLACES[where.place]}, {BACKGROUNDS[where.background]}"
    return f"{name}, {text}" if name else text


def paint(who: Identity, where: Scene) -> Image:
    """The picture, (64, 64, 3) RGB."""
    rng = np.random.default_rng([where.seed, 7])
    canvas = _background(where.background, int(rng.choice([-1, 1])))
    _creature_at(canvas, who, where, rng)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def mask(who: Identity, where: Scene) -> Image:
    """How much of each pixel of `paint` is the creature, and not what is behind it, (64, 64), 0 to 255: what shows of a
    white background that does not show of a black one."""
    over = []
    for ground in (0.0, 1.0):
        rng = np.random.default_rng([where.seed, 7])
        rng.choice([-1, 1])
        canvas = np.full((SIZE, SIZE, 3), ground, np.float32)
        _creature_at(canvas, who, where, rng)
        over.append(canvas[..., 0])
    return (np.clip(1 - (over[1] - over[0]), 0, 1) * 255 + 0.5).astype(np.uint8)


# --- drawing ----------------------------------------------------------------------------------------------

_Y, _X = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[:SIZE, :SIZE])


def _colour(name: str, shade: tuple[float, float, float] = (0, 0, 0), *, value: float = 0.92) -> Field:
    hue = (HUES[name] + 0.025 * shade[0]) % 1
    return np.array(colorsys.hsv_to_rgb(hue, 0.78 + 0.14 * shade[1], value + 0.08 * shade[2]), np.float32)


def _rgb(red: float, green: float, blue: float) -> Field:
    return np.array((red, green, blue), np.float32)


def _blend(canvas: Field, distance: Field, colour: Field | float, opacity: float | Field = 1.0) -> None:
    """Lay `colour` over the pixels with distance < 0, edges one pixel soft."""
    cover = np.clip(0.5 - distance, 0, 1) * opacity
    canvas += cover[..., None] * (colour - canvas)


def _ellipse(x: Field, y: Field, rx: float, ry: float) -> Field:
    return (np.sqrt((x / rx) ** 2 + (y / ry) ** 2) - 1) * min(rx, ry)


def _box(x: Field, y: Field, rx: float, ry: float, corner: float) -> Field:
    dx, dy = np.abs(x) - rx + corner, np.abs(y) - ry + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _segment(x: Field, y: Field, start: tuple[float, float], end: tuple[float, float], width: float) -> Field:
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy) - width / 2


def _triangle(x: Field, y: Field, half_width: float, top: float, bottom: float) -> Field:
    """An upright isosceles triangle, its tip at (0, top), its foot at y = bottom > top."""
    height = bottom - top
    slope = ((np.abs(x) * height) - (y - top) * half_width) / float(np.hypot(height, half_width))
    return np.maximum(slope, y - bottom)


def _background(kind: str, side: int) -> Field:
    """side: -1 or 1, the side of the sun, the moon, the cloud or the window."""
    sky, ground = {
        "meadow": ((0.62, 0.85, 0.98), (0.45, 0.72, 0.33)),
        "night": ((0.07, 0.09, 0.25), (0.14, 0.20, 0.24)),
        "beach": ((0.45, 0.80, 0.93), (0.94, 0.84, 0.58)),
        "snow": ((0.70, 0.76, 0.86), (0.97, 0.98, 1.00)),
        "room": ((0.87, 0.72, 0.60), (0.52, 0.35, 0.24)),
    }[kind]
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = sky
    x = _X - 32 - 22 * side
    if kind == "meadow":
        _blend(canvas, _ellipse(x, _Y - 9, 8, 3.5), _rgb(1, 1, 1))
    elif kind == "night":
        _blend(canvas, _ellipse(x, _Y - 10, 5, 5), _rgb(0.98, 0.95, 0.75))
        for star_x, star_y in ((5, 24), (22, 5), (32, 14), (42, 5), (59, 24)):
            _blend(canvas, _ellipse(_X - star_x, _Y - star_y, 1, 1), _rgb(1, 1, 0.9))
    elif kind == "beach":
        _blend(canvas, _ellipse(x, _Y - 10, 6, 6), _rgb(1.0, 0.86, 0.25))
        _blend(canvas, 36 - _Y, _rgb(0.12, 0.45, 0.75))
    elif kind == "room":
        _blend(canvas, _box(x, _Y - 14, 6.5, 7.5, 1), _rgb(0.98, 0.97, 0.92))
        _blend(canvas, _box(x, _Y - 14, 5, 6, 0.5), _rgb(0.55, 0.78, 0.95))
    _blend(canvas, 44 - _Y + (0.8 * np.sin(_X / 6) if kind != "room" else 0), _rgb(*ground))
    if kind == "snow":
        _blend(canvas, _triangle(x, _Y, 7, 22, 46), _rgb(0.22, 0.42, 0.36))
        for flake_x, flake_y in ((6, 8), (16, 20), (26, 6), (38, 12), (48, 5), (58, 18), (5, 34), (60, 36)):
            _blend(canvas, _ellipse(_X - flake_x, _Y - flake_y, 1.2, 1.2), _rgb(1, 1, 1))
    return canvas


class _Body(NamedTuple):
    distance: Field
    """Pixels to the outline; negative inside."""
    half_width: float
    top: float


def _body(shape: str, x: Field, y: Field, r: float) -> _Body:
    match shape:
        case "round":
            return _Body(_ellipse(x, y, r, r), r, -r)
        case "square":
            return _Body(_box(x, y, 0.9 * r, 0.9 * r, 0.25 * r), 0.9 * r, -0.9 * r)
        case "tall":
            return _Body(_ellipse(x, y, 0.72 * r, 1.12 * r), 0.72 * r, -1.12 * r)
        case "wide":
            return _Body(_ellipse(x, y - 0.15 * r, 1.2 * r, 0.82 * r), 1.2 * r, -0.67 * r)
        case "pear":
            top = _ellipse(x, y + 0.42 * r, 0.62 * r, 0.62 * r)
            return _Body(np.minimum(top, _ellipse(x, y - 0.25 * r, 0.98 * r, 0.74 * r)), 0.8 * r, -1.04 * r)
        case "triangle":
            return _Body(_triangle(x, y, 1.15 * r, -1.15 * r, 0.95 * r), 0.75 * r, -1.0 * r)
    raise ValueError(f"unknown shape {shape!r}")


def _pattern(who: Identity, x: Field, y: Field, r: float) -> Field:
    """Distance to the pattern's figures, in pixels, before they are cut to the body."""
    period = 0.7 * r
    match who.pattern:
        case "stripes":
            return (np.abs((x / period) % 1 - 0.5) - 0.25) * period
        case "bands":
            return (np.abs((y / period + 0.25) % 1 - 0.5) - 0.25) * period
        case "spots":
            row = np.floor(y / period + 0.5)
            u, v = (x / period + 0.5 * (row % 2)) % 1 - 0.5, (y / period + 0.5) % 1 - 0.5
            return (np.hypot(u, v) - 0.3) * period
        case "patches":
            return _ellipse(x - 0.6 * who.patch_side * r, y + 0.3 * r, 0.62 * r, 0.72 * r)
        case "checkered":
            u, v = np.floor(x / (0.5 * r)), np.floor(y / (0.5 * r))
            return np.where((u + v) % 2 < 1, -1.0, 1.0).astype(np.float32)
    raise ValueError(f"unknown pattern {who.pattern!r}")


def _headgear(canvas: Field, who: Identity, x: Field, y: Field, r: float, body: _Body) -> None:
    _, half, top = body
    colour, dark = _colour(who.headgear_colour), _colour(who.headgear_colour, value=0.6)
    sides = (-1, 1)
    match who.headgear:
        case "ears":
            for side in sides:
                _blend(canvas, _ellipse(x - side * 0.55 * half, y - top - 0.02 * r, 0.27 * r, 0.52 * r), dark)
                _blend(canvas, _ellipse(x - side * 0.55 * half, y - top + 0.02 * r, 0.18 * r, 0.40 * r), colour)
        case "horns":
            for side in sides:
                tilted = x - side * (0.55 * half - 0.35 * (y - top))
                _blend(canvas, _triangle(tilted, y, 0.24 * r, top - 0.52 * r, top + 0.32 * r), colour)
        case "hat":
            _blend(canvas, _box(x, y - top + 0.30 * r, 0.42 * r, 0.36 * r, 0.06 * r), colour)
            _blend(canvas, _box(x, y - top + 0.10 * r, 0.43 * r, 0.09 * r, 0.0), dark)
            _blend(canvas, _box(x, y - top - 0.06 * r, 0.72 * r, 0.11 * r, 0.08 * r), colour)
        case "antenna":
            _blend(canvas, _segment(x, y, (0, top + 2), (0, top - 0.42 * r), 0.14 * r), dark)
            _blend(canvas, _ellipse(x, y - top + 0.48 * r, 0.21 * r, 0.21 * r), colour)
        case "bow":
            for side in sides:
                turned = side * x
                loop = np.maximum(np.abs(y - top) - 0.6 * turned - 0.05 * r, np.maximum(turned - 0.6 * r, -turned))
                _blend(canvas, loop, colour)
            _blend(canvas, _ellipse(x, y - top, 0.16 * r, 0.16 * r), dark)


def _creature_at(canvas: Field, who: Identity, where: Scene, rng: np.random.Generator) -> None:
    """rng: that of the scene, after the background's side."""
    radius = {"small": 13.0, "big": 17.5}[where.size]
    centre_x = {"left": 20.0, "middle": 32.0, "right": 44.0}[where.place] + rng.uniform(-SHIFT, SHIFT)
    centre_y = 56.0 - radius + rng.uniform(-SHIFT, SHIFT)
    _creature(canvas, who, centre_x, centre_y, radius)


def _creature(canvas: Field, who: Identity, centre_x: float, centre_y: float, r: float) -> None:
    x, y = _X - centre_x, _Y - centre_y
    shape = _body(who.shape, x, y, r)
    body, half, top = shape
    colour = _colour(who.colour, who.shade)
    outline = 0.35 * colour
    _blend(canvas, _ellipse(x, y - 1.0 * r, 0.95 * r, 0.13 * r), 0.0, 0.25)
    for side in (-1, 1):
        _blend(canvas, _ellipse(x - side * 0.42 * r, y - 0.93 * r, 0.26 * r, 0.16 * r), outline)
    _headgear(canvas, who, x, y, r, shape)
    _blend(canvas, body - 0.6, outline)
    _blend(canvas, body + 0.6, colour)
    if who.pattern != "plain":
        figures = _pattern(who, x, y, r)
        _blend(canvas, np.maximum(figures, body + 0.8), _colour(who.pattern_colour, value=0.5))
    if who.belly:
        belly = np.maximum(_ellipse(x, y - 0.62 * r, 0.46 * r, 0.38 * r), body + 1.0)
        _blend(canvas, belly, _rgb(0.99, 0.94, 0.84))
    eye_y = top + 0.62 * r
    spread = {1: [0.0], 2: [-0.34, 0.34], 3: [-0.52, 0.0, 0.52]}[who.num_eyes]
    size = {1: 0.33, 2: 0.26, 3: 0.22}[who.num_eyes] * r
    squeeze = min(1.0, half / r + 0.1)
    white = _rgb(1, 1, 1) if who.eye_colour == "black" else _rgb(1.0, 0.85, 0.1)
    for offset in spread:
        ex, ey = x - offset * r * squeeze, y - eye_y
        _blend(canvas, _ellipse(ex, ey, size + 0.6, size + 0.6), outline)
        _blend(canvas, _ellipse(ex, ey, size, size), white)
        _blend(canvas, _ellipse(ex, ey - 0.1 * size, 0.52 * size, 0.52 * size), _rgb(0.05, 0.05, 0.08))
    smile = np.maximum(np.abs(np.hypot(x, y - eye_y - 0.42 * r) - 0.22 * r) - 0.075 * r, eye_y + 0.46 * r - y)
    _blend(canvas, smile, _rgb(0.15, 0.05, 0.08))
