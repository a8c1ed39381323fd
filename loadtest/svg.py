"""Charts as SVG, drawn by CSS variables of the page they lie in: --c0 … for series, --ink, --muted and --line. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 620, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 44
_MOST_POINTS = 600  # of a line: more are not seen

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Points and how they are joined."""

    name: str
    points: Pairs
    colour: int
    kind: Literal["line", "dots", "dashes", "area"] = "line"


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars that may be stacked: each has a left and a right end, and a height for each name."""

    names: Sequence[str]
    colours: Sequence[int]
    bars: Sequence[tuple[float, float, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A line through the chart at a value of one axis."""

    axis: Literal["x", "y"]
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows. Logarithmic ones leave out what is not above 0."""

    text: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, 0 to 1."""
        low, high, value = (math.log(max(v, 1e-9)) if self.log else v for v in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0

    def ticks(self) -> list[float]:
        return (self._log_ticks() if self.log else []) or self._even_ticks()

    def _log_ticks(self) -> list[float]:
        """1, 2, 5 … or powers of ten; none where so few fit that they tell nothing."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 500 else (1,)
        found = self._within([step * 10.0**power for power in powers for step in steps])
        return found if len(found) > 2 else []

    def _even_ticks(self) -> list[float]:
        apart = _round_up((self.high - self.low) / 6)
        first, last = math.ceil(self.low / apart - 1e-9), math.floor(self.high / apart + 1e-9)
        return self._within([number * apart for number in range(first, last + 1)])

    def _within(self, values: Sequence[float]) -> list[float]:
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def up_to(values: Sequence[float], text: str) -> Axis:
    """A linear axis from 0 to a little more than the greatest."""
    return Axis(text, 0.0, max([*values, 1e-9]) * 1.06)


def over(values: Sequence[float], text: str) -> Axis:
    """A logarithmic axis around the values above 0."""
    known = [value for value in values if value > 0] or [0.1, 1.0]
    return Axis(text, min(known) / 1.15, max(known) * 1.15, log=True)


def chart(x: Axis, y: Axis, series: Sequence[Series], *, bars: Bars | None = None, marks: Sequence[Mark] = ()) -> str:
    """The picture, and a legend where more than one thing is in it."""
    body = [*_grid(x, y), *(_bars(bars, x, y) if bars else ())]
    for one in series:
        body += _series(one, x, y)
    body += [part for mark in marks for part in _mark(mark, x, y)]
    named = [(one.name, one.colour) for one in series] + (
        list(zip(bars.names, bars.colours, strict=True)) if bars else []
    )
    legend = "".join(
        f'<span><i style="background:var(--c{colour})"></i>{escape(name)}</span>' for name, colour in named
    )
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y.text)} by {escape(x.text)}">'
    shown = f'<p class="legend">{legend}</p>' if len(named) > 1 else ""
    return f"{shown}{picture}{''.join(body)}</svg>"


def steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """The cumulative distribution: for each value, the share that is at most as large. Thinned where there are many."""
    ordered = sorted(values)
    every = max(1, len(ordered) // _MOST_POINTS)
    kept = sorted({*range(0, len(ordered), every), len(ordered) - 1}) if ordered else []
    return [(ordered[index], (index + 1) / len(ordered)) for index in kept]


def number(value: float) -> str:
    """As few digits as tell it."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10 …"""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-12)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def _x(value: float, axis: Axis) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in y.ticks():
        at = _y(value, y)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for value in x.ticks():
        at = _x(value, x)
        yield f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{number(value)}</text>'
    yield f'<line class="tick" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x.text)}</text>'
    yield f'<text x="4" y="12">{escape(y.text)}</text>'


def _series(one: Series, x: Axis, y: Axis) -> Iterator[str]:
    points = [(px, py) for px, py in one.points if (px > 0 or not x.log) and (py > 0 or not y.log)]
    if not points:
        return
    places = " ".join(f"{_x(px, x):.1f},{_y(py, y):.1f}" for px, py in points)
    colour = f"var(--c{one.colour})"
    if one.kind == "area":
        first, last = (f"{_x(px, x):.1f},{_y(y.low, y):.1f}" for px in (points[0][0], points[-1][0]))
        yield f'<polygon points="{first} {places} {last}" fill="{colour}" opacity="0.18"/>'
    dashes = ' stroke-dasharray="5 5"' if one.kind == "dashes" else ""
    yield f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    if one.kind == "dots":
        for px, py in points:
            told = f"{escape(one.name)}: {number(py)} at {number(px)}"
            circle = f'<circle class="dot" cx="{_x(px, x):.1f}" cy="{_y(py, y):.1f}" r="4" fill="{colour}">'
            yield f"{circle}<title>{told}</title></circle>"


def _bars(bars: Bars, x: Axis, y: Axis) -> Iterator[str]:
    for left, right, heights in bars.bars:
        base = 0.0
        for name, colour, height in zip(bars.names, bars.colours, heights, strict=True):
            if height <= 0:
                continue
            top, bottom = _y(base + height, y), _y(base, y)
            start, end = _x(left, x) + 0.5, _x(right, x) - 0.5
            yield (
                f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(end - start, 0.8):.1f}" '
                f'height="{max(bottom - top, 0.5):.1f}" fill="var(--c{colour})"><title>{escape(name)}: '
                f"{number(height)}, {number(left)} to {number(right)}</title></rect>"
            )
            base += height


def _mark(mark: Mark, x: Axis, y: Axis) -> Iterator[str]:
    if mark.axis == "x":
        at = _x(mark.at, x)
        yield f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        anchor, put = ("end", at + 4) if x.share(mark.at) > 0.6 else ("start", at - 4)
        place = f'x="{put:.1f}" y="{_TOP - 6}" text-anchor="{anchor}"'
        yield f'<text class="said" {place}>{escape(mark.text)}</text>'
    elif y.low <= mark.at <= y.high:
        at = _y(mark.at, y)
        yield f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="said" x="{_LEFT + 6}" y="{at - 5:.1f}">{escape(mark.text)}</text>'
