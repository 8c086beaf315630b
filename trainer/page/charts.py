"""Charts for a page: where lines, points, ticks and labels of an inline SVG are. The page draws and colours them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 250  # units of the SVG, about pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 400, 20, 212  # where the axes are
MAX_POINTS = 200  # of a line
MAX_DOTS = 40  # a line of more points has no dots
Curve = Sequence[tuple[float, float]]
"""Points x, y by rising x."""


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    told: str
    """What is read when a pointer is over it."""
    kind: str = ""
    """"chosen", "beaten", or empty."""


@dataclass(frozen=True)
class Line:
    name: str
    path: str
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Text, ...]
    y_ticks: tuple[Text, ...]
    labels: tuple[Text, ...] = ()
    axes: tuple[str, str] = ("step", "")
    """The names of x and y; an empty one is not drawn."""
    marker: float | None = None
    """The x of a vertical line."""
    steps: tuple[float, float] | None = None
    """The steps at both ends of x, if x is steps."""


@dataclass(frozen=True)
class _Axis:
    """Numbers low to high lie at places start to end."""

    low: float
    high: float
    start: float
    end: float
    room: float = 0.0
    """What is left free at both ends, as a share of the whole."""
    limits: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        span = self.high - self.low or abs(self.high) * 0.2 or 1.0
        extra = self.room * span if self.high > self.low else span / 2
        object.__setattr__(self, "limits", (self.low - extra, self.high + extra))

    def at(self, value: float) -> float:
        low, high = self.limits
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, about: int, *, whole: bool = False) -> Iterator[tuple[float, str]]:
        """Round numbers within the limits with their places; whole: only integers."""
        low, high = self.limits
        rough = (high - low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        size = max(size, 1.0) if whole else size
        for number in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1):
            yield self.at(number * size), shown(number * size)


def shown(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-") if value else "0"


def curves(title: str, lines: Mapping[str, Curve], *, marked: float | None = None, note: str = "") -> Chart | None:
    """Lines over steps by their names; None if no line has a point. marked: a step with a vertical line."""
    there = {name: points for name, points in lines.items() if points}
    if not there:
        return None
    every = [point for points in there.values() for point in points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    across = _Axis(first, last, LEFT, RIGHT)
    up = _Axis(min(y for _, y in every), max(y for _, y in every), BOTTOM, TOP, room=0.06)
    drawn = tuple(_line(name, _thinned(points), across, up, marked) for name, points in there.items())
    at = across.at(marked) if marked is not None and first <= marked <= last else None
    labels = () if at is None else (_beside(at, TOP - 6, f"chosen: {marked:g}"),)
    return Chart(
        title,
        note,
        drawn,
        tuple(Text(x, BOTTOM + 16, text) for x, text in across.ticks(5, whole=True)),
        tuple(Text(LEFT - 6, y, text, "end") for y, text in up.ticks(4)),
        labels,
        marker=at,
        steps=across.limits,
    )


def _line(name: str, points: Curve, across: _Axis, up: _Axis, marked: float | None) -> Line:
    places = [(across.at(x), up.at(y)) for x, y in points]
    dots = tuple(
        Dot(*place, f"{name} at step {x:g}: {y:.4g}", "chosen" if x == marked else "")
        for place, (x, y) in zip(places, points, strict=True)
    )
    return Line(name, _path(places), dots if len(points) <= MAX_DOTS else ())


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:g} {y:g}" for x, y in places)


def _beside(x: float, y: float, text: str) -> Text:
    """A text at x that does not reach over the ends of the axis."""
    half = 3.5 * len(text)
    anchor = "start" if x - half < LEFT else "end" if x + half > RIGHT else "middle"
    return Text(x, y, text, anchor)


def _thinned(points: Curve) -> Curve:
    """At most MAX_POINTS, with the first and the last one."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def smoothed(points: Curve, window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` points at each of them; the first ones have fewer."""
    found, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y - (points[index - window][1] if index >= window else 0.0)
        found.append((x, total / min(index + 1, window)))
    return found


def trade(title: str, points: Sequence[tuple[int, float, float]], names: tuple[str, str], chosen: int | None) -> Chart:
    """Steps as points in a plane of two measures, a small x and a great y being good; a thin line joins them in order.

    points: step, x, y. A point is beaten if another one is at least as good in both and better in one. names: of x, y.
    """
    across = _Axis(min(x for _, x, _ in points), max(x for _, x, _ in points), LEFT, RIGHT, room=0.08)
    up = _Axis(min(y for *_, y in points), max(y for *_, y in points), BOTTOM, TOP, room=0.1)
    dots = {}
    for step, x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in points)
        kind = "chosen" if step == chosen else "beaten" if beaten else ""
        dots[step] = Dot(across.at(x), up.at(y), f"step {step}: {names[0]} {x:.4g}, {names[1]} {y:.4g}", kind)
    order = sorted(dots)
    first = [step for step in (chosen, order[-1], order[0]) if step in dots]
    return Chart(
        title,
        "",
        (Line("", _path([(dots[step].x, dots[step].y) for step in order]), tuple(dots[step] for step in order)),),
        tuple(Text(x, BOTTOM + 16, text) for x, text in across.ticks(5)),
        tuple(Text(LEFT - 6, y, text, "end") for y, text in up.ticks(4)),
        tuple(_labels(dots, [*dict.fromkeys([*first, *order])])),
        axes=names,
    )


def _labels(dots: Mapping[int, Dot], order: Sequence[int]) -> Iterator[Text]:
    """The step beside each dot, right, left, above or below, where it covers no dot and no label; else none."""
    taken = [(dot.x - 4, dot.y - 4, dot.x + 4, dot.y + 4) for dot in dots.values()]
    for step in order:
        dot, wide = dots[step], 7.0 * len(str(step)) + 3
        places = [(8, 4, "start", 0.0), (-8, 4, "end", wide), (0, -8, "middle", wide / 2), (0, 16, "middle", wide / 2)]
        for right, down, anchor, before in places:
            x, y = dot.x + right, dot.y + down
            box = (x - before, y - 10, x - before + wide, y + 1)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                yield Text(x, y, str(step), anchor)
                break


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def bars(values: Sequence[float], before: Sequence[float]) -> list[tuple[float, float]]:
    """Heights of bars, 0 to 20, and those of marks for `before` (or the same again if there are none)."""
    before = before if len(before) == len(values) else values
    most = max([*values, *before, 1e-12])
    return [(round(20 * a / most, 1), round(20 * b / most, 1)) for a, b in zip(values, before, strict=True)]
