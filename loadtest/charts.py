"""Charts as SVG, drawn by matplotlib.

A `Chart` is data: two axes, series of points, stacked bars and reference lines. It is drawn by one of

- `inline_svg(chart, *, name) -> str`: for an HTML page, in the colours of its CSS variables --c0 to --c7, --ink,
  --muted and --line (`PALETTE` has their values in light mode);
- `standalone_svg(charts) -> str`: a file of charts side by side with one legend, on white.

`STYLE` has matplotlib's settings, for figures that these do not describe.

`linear_axis(values, label)` and `log_axis(values, label)` make axes that fit the values; `cumulative(values)` gives the
points of a distribution. The output is deterministic. matplotlib is imported by the first drawing: it takes 0.5 s.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

_WIDTH, _HEIGHT = 6.2, 3.0  # inches, of one chart
_LEGEND_ROW = 0.2  # inches
_LEGEND_COLUMNS = 4
_MAX_POINTS = 600  # of a line: more are not visible
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# c0 to c7 can be distinguished with colour vision deficiencies.
PALETTE: Mapping[str, str] = {
    "c0": "#2a78d6",
    "c1": "#eb6834",
    "c2": "#1baf7a",
    "c3": "#eda100",
    "c4": "#e87ba4",
    "c5": "#008300",
    "c6": "#4a3aa7",
    "c7": "#a8a7a2",
    "ink": "#1c1c1a",
    "muted": "#6b6a66",
    "line": "#e3e2de",
}
STYLE: Mapping[Any, Any] = {  # matplotlib's settings for all figures of the project
    "svg.fonttype": "none",  # text stays text: small, searchable, and in the page's colours
    "svg.hashsalt": "latentd",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": PALETTE["muted"],
    "axes.facecolor": "none",
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlecolor": PALETTE["ink"],
    "axes.titlesize": 11,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "ytick.major.size": 0,
    "grid.color": PALETTE["line"],
    "legend.frameon": False,
}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x, joined by a line; `colour` is an index into c0 to c7."""

    name: str
    points: Points
    colour: int
    style: Literal["line", "dots", "dashes", "area"] = "line"


@dataclass(frozen=True, slots=True)
class StackedBars:
    """Bars of (left, right, heights), with a height for each name from the bottom up."""

    names: Sequence[str]
    colours: Sequence[int]
    bars: Sequence[tuple[float, float, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class ReferenceLine:
    """A labelled line through the chart at one value of an axis."""

    axis: Literal["x", "y"]
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class ChartAxis:
    """An axis: its label with the unit, and its range. A logarithmic axis leaves out values of 0 or less."""

    label: str
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart; colours of the legend's entries should differ."""

    x: ChartAxis
    y: ChartAxis
    series: Sequence[Series] = ()
    bars: StackedBars | None = None
    lines: Sequence[ReferenceLine] = ()
    title: str = ""


def linear_axis(values: Sequence[float], label: str) -> ChartAxis:
    """Return a linear axis from 0 to a little more than the greatest value."""
    return ChartAxis(label, 0.0, max([*values, 1e-9]) * 1.06)


def log_axis(values: Sequence[float], label: str) -> ChartAxis:
    """Return a logarithmic axis around the values above 0."""
    positive = [value for value in values if value > 0] or [0.1, 1.0]
    return ChartAxis(label, min(positive) / 1.15, max(positive) * 1.15, log=True)


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Return the cumulative distribution: the share of values up to each, thinned where there are many."""
    ordered = sorted(values)
    every = max(1, len(ordered) // _MAX_POINTS)
    kept = sorted({*range(0, len(ordered), every), len(ordered) - 1}) if ordered else []
    return [(ordered[index], (index + 1) / len(ordered)) for index in kept]


def number(value: float) -> str:
    """Format a number with three significant digits, or without decimals from 1000."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Format seconds with their unit, below 1 s as milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def inline_svg(chart: Chart, *, name: str) -> str:
    """Draw `chart` for an HTML page; `name` keeps its ids apart from those of the page's other charts."""
    root = _render([chart])
    root.set("role", "img")
    root.set("aria-label", f"{chart.y.label} by {chart.x.label}")
    for size in ("width", "height"):  # the page's
        del root.attrib[size]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", ElementTree.tostring(root, encoding="unicode"))
    variables = {value: f"var(--{variable}, {value})" for variable, value in PALETTE.items()}
    return re.sub("|".join(variables), lambda found: variables[found[0]], text)


def standalone_svg(charts: Sequence[Chart]) -> str:
    """Draw `charts` side by side as the text of an SVG file."""
    return ElementTree.tostring(_render(charts, background="#ffffff"), encoding="unicode") + "\n"


def _render(charts: Sequence[Chart], *, background: str = "none") -> ElementTree.Element:
    """Draw with matplotlib's objects, not with pyplot, which keeps figures and a backend for the whole process."""
    from matplotlib import rc_context  # noqa: PLC0415 - see the module's docstring
    from matplotlib.figure import Figure  # noqa: PLC0415

    legend = _legend_entries(charts)
    rows = -(-len(legend) // _LEGEND_COLUMNS) if len(legend) > 1 else 0
    with rc_context(dict(STYLE)):
        size = (_WIDTH * max(len(charts), 1), _HEIGHT + rows * _LEGEND_ROW)
        figure = Figure(figsize=size, layout="constrained", facecolor=background)
        tooltips: dict[str, Sequence[str]] = {}
        for index, chart in enumerate(charts):
            for artist, texts in _draw(figure.add_subplot(1, len(charts), index + 1), chart):
                gid = f"data{len(tooltips)}"
                artist.set_gid(gid)
                tooltips[gid] = texts
        if rows:
            _add_legend(figure, legend)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _with_tooltips(file.getvalue(), tooltips)


def _draw(axes: Axes, chart: Chart) -> Iterator[tuple[Artist, Sequence[str]]]:
    """Draw `chart`; yield the artists that get tooltips, with a text for each of their marks."""
    axes.set(
        xscale="log" if chart.x.log else "linear",
        yscale="log" if chart.y.log else "linear",
        xlim=(chart.x.low, max(chart.x.high, chart.x.low + 1e-9)),
        ylim=(chart.y.low, max(chart.y.high, chart.y.low + 1e-9)),
        xlabel=chart.x.label,
        ylabel=chart.y.label,
        title=chart.title,
    )
    for axis, spec in ((axes.xaxis, chart.x), (axes.yaxis, chart.y)):
        _set_ticks(axis, spec)
    axes.grid(axis="y")
    if chart.bars:
        yield from _draw_bars(axes, chart.bars)
    for series in chart.series:
        yield from _draw_series(axes, series, chart)
    for line in chart.lines:
        _draw_line(axes, line)


def _set_ticks(axis: Axis, spec: ChartAxis) -> None:
    """Tick a logarithmic axis at 1, 2, 5 … or at powers of ten; at even distances where few of those are in range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415 - see the module's docstring

    locator: Locator = MaxNLocator(6, steps=(1, 2, 5, 10))
    if spec.log:
        logarithmic = LogLocator(subs=(1.0, 2.0, 5.0) if spec.high / spec.low < 500 else (1.0,))
        if sum(spec.low <= tick <= spec.high for tick in logarithmic.tick_values(spec.low, spec.high)) > 2:
            locator = logarithmic
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: number(value))


def _draw_series(axes: Axes, series: Series, chart: Chart) -> Iterator[tuple[Artist, Sequence[str]]]:
    points = [(x, y) for x, y in series.points if (x > 0 or not chart.x.log) and (y > 0 or not chart.y.log)]
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    style: dict[str, Any] = {"color": PALETTE[f"c{series.colour}"], "linewidth": 1.5}
    if series.style == "area":
        axes.fill_between(xs, ys, chart.y.low, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(xs, ys, linestyle="--" if series.style == "dashes" else "-", **style)
    if series.style == "dots":
        (dots,) = axes.plot(xs, ys, "o", markersize=5, color=style["color"])
        yield dots, [f"{series.name}: {number(y)} at {number(x)}" for x, y in points]


def _draw_bars(axes: Axes, bars: StackedBars) -> Iterator[tuple[Artist, Sequence[str]]]:
    bases = [0.0] * len(bars.bars)
    for level, (name, colour) in enumerate(zip(bars.names, bars.colours, strict=True)):
        for index, (left, right, heights) in enumerate(bars.bars):
            if heights[level] <= 0:
                continue
            (bar,) = axes.bar(
                left, heights[level], right - left, bases[index], align="edge", color=PALETTE[f"c{colour}"]
            )
            bases[index] += heights[level]
            yield bar, [f"{name}: {number(heights[level])}, {number(left)} to {number(right)}"]


def _draw_line(axes: Axes, line: ReferenceLine) -> None:
    style: dict[str, Any] = {"color": PALETTE["ink"], "linestyle": ":", "linewidth": 1}
    if line.axis == "y":
        axes.axhline(line.at, **style)
        place: dict[str, Any] = {"xy": (0, line.at), "xycoords": ("axes fraction", "data"), "xytext": (4, 3)}
    else:
        axes.axvline(line.at, **style)
        low, high = axes.get_xlim()
        on_right = line.at > low + 0.6 * (high - low)
        place = {"xy": (line.at, 1), "xycoords": ("data", "axes fraction"), "xytext": (-3 if on_right else 3, 3)}
        place["ha"] = "right" if on_right else "left"
    axes.annotate(line.label, textcoords="offset points", color=PALETTE["ink"], **place)


def _legend_entries(charts: Sequence[Chart]) -> list[tuple[str, int]]:
    """Return the names and colours of all charts, each once."""
    entries = [(series.name, series.colour) for chart in charts for series in chart.series]
    for chart in charts:
        if chart.bars:
            entries += zip(chart.bars.names, chart.bars.colours, strict=True)
    return list(dict.fromkeys(entries))


def _add_legend(figure: Figure, entries: Sequence[tuple[str, int]]) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415 - see the module's docstring

    handles = [Patch(color=PALETTE[f"c{colour}"], label=name) for name, colour in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=_LEGEND_COLUMNS, handlelength=0.9, handleheight=0.9)


def _with_tooltips(svg: bytes, tooltips: Mapping[str, Sequence[str]]) -> ElementTree.Element:
    """Parse matplotlib's SVG and add a `<title>` to each mark of the groups that `tooltips` names."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    for gid, texts in tooltips.items():
        group = root.find(f".//{{{_SVG}}}g[@id='{gid}']")
        marks = [] if group is None else group.findall(f".//{{{_SVG}}}use") or [group]
        if len(marks) == len(texts):  # matplotlib leaves out marks beyond the figure
            for mark, text in zip(marks, texts, strict=True):
                ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = text
    return root
