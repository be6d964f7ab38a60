"""Curves as SVG, without a graphics library."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from mlx_fit.cli.report_runs import Points

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 36
DOTS = 60  # a curve of more points is a line without dots
MOST = 800  # points of a curve that are drawn
LARGEST = 1e150  # beyond, the length of an axis could overflow
LOGARITHMIC = 1000  # values that span so large a factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: what it is, for the text that shows when the mouse rests on it.
        points: places and values, in order.
        colour: which of the page's colours, from 0.
        dash: which pattern of dashes, 0 for none.
    """

    label: str
    points: Points
    colour: int
    dash: int = 0


def drawable(value: float) -> bool:
    """Whether a value has a place in a picture: NaN and infinity have none."""
    return abs(value) < LARGEST


class Axis:
    """Places numbers between two pixels.

    Args:
        values: finite numbers that must fit.
        start, stop: the pixels of the smallest and the largest.
        is_log: whether equal factors are equally far apart.
        whole: whether ticks stand at whole numbers only.
    """

    def __init__(
        self,
        values: list[float],
        start: float,
        stop: float,
        is_log: bool = False,
        whole: bool = False,
    ) -> None:
        self.is_log = is_log
        low, high = min(values), max(values)
        if is_log:
            low, high = math.log10(low), math.log10(high)
        elif high - low <= 1e-9 * max(abs(low), abs(high)):
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        self._low, self._high, self._whole = low, high, whole
        self._start, self._scale = start, (stop - start) / (high - low)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        place = math.log10(value) if self.is_log else value
        return self._start + (place - self._low) * self._scale

    def ticks(self) -> list[float]:
        """Round numbers in reach, about five."""
        if self.is_log:
            every = max(1, round((self._high - self._low) / 5))
            first, last = math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9)
            return [10.0**exponent for exponent in range(first, last + 1, every)]
        rough = (self._high - self._low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        step = max(step, 1.0) if self._whole else step
        lowest, highest = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        return [count * step for count in range(lowest, highest + 1)]


def chart(title: str, curves: list[Curve], axis: str) -> str:
    """One picture of curves, as an ``svg`` element.

    Args:
        title: read aloud instead of the picture.
        curves: at least one, with at least one finite value among them.
        axis: what the places are, for example ``"epoch"``.
    """
    points = [point for curve in curves for point in curve.points if drawable(point[1])]
    values = [value for _, value in points]
    is_log = min(values) > 0 and max(values) / min(values) >= LOGARITHMIC
    across = Axis([place for place, _ in points], LEFT, WIDTH - RIGHT, whole=True)
    up = Axis(values, HEIGHT - BOTTOM, TOP, is_log)
    label = f"{axis}, values on a logarithmic axis" if is_log else axis
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(title)}">',
            *_grid(across, up),
            f'<text x="{middle:g}" y="{HEIGHT - 4}" text-anchor="middle">{_escape(label)}</text>',
            *(_line(curve, across, up) for curve in curves),
            "</svg>",
        ]
    )


def _grid(across: Axis, up: Axis) -> list[str]:
    floor, parts = HEIGHT - BOTTOM, []
    for tick in up.ticks():
        y = f"{up.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{short(tick)}</text>')
    for tick in across.ticks():
        x = f"{across.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{x}" y="{floor + 16}" text-anchor="middle">{short(tick)}</text>')
    return parts


def _line(curve: Curve, across: Axis, up: Axis) -> str:
    """A curve as a group: lines between its gaps, and dots that tell their values."""
    pieces: list[list[str]] = [[]]
    dots = []
    for place, value in thinned(curve.points):
        if not drawable(value):
            pieces.append([])
            continue
        x, y = f"{across.at(place):.1f}", f"{up.at(value):.1f}"
        pieces[-1].append(f"{x},{y}")
        text = _escape(f"{curve.label}: {number(value)} at {place:g}")
        dots.append(f'<circle cx="{x}" cy="{y}" r="2.2"><title>{text}</title></circle>')
    lines = [f'<polyline points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    shown = dots if len(dots) <= DOTS or not lines else []
    name = f"<title>{_escape(curve.label)}</title>"
    return f'<g class="c{curve.colour} d{curve.dash}">{name}{"".join(lines + shown)}</g>'


def thinned(points: Points) -> Points:
    """At most ``MOST`` points: the smallest and the largest of every stretch, so no peak is lost.

    >>> thinned([(1.0, 2.0), (2.0, 3.0)])
    [(1.0, 2.0), (2.0, 3.0)]
    """
    if len(points) <= MOST:
        return points
    length = -(-len(points) * 2 // MOST)
    kept: Points = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        values = [point for point in stretch if drawable(point[1])] or stretch[:1]
        ends = {f(values, key=lambda point: point[1]) for f in (min, max)}
        kept += sorted(ends)
    return kept


def number(value: float) -> str:
    """Up to five significant digits."""
    return f"{value:.5g}"


def short(value: float) -> str:
    """A tick's number, which is round: 0.30000000000000004 is 0.3; 20000 stays so."""
    value = 0.0 if abs(value) < 1e-300 else value
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.6g}"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
