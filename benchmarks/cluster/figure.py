"""The figure of the simulation: where does p99 break?"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cluster.balancers import BalancerName
from benchmarks.cluster.results import LIMIT, ScalingPoint, SeedFigures, SimulationResults, mean_p99
from benchmarks.cluster.workload import Pattern
from loadtest.charts import PALETTE, STYLE

_TOP = 12.0  # times an idle server's latency; what lies above is drawn at the edge
_COLOURS: dict[BalancerName, str] = {"round robin": "c1", "power of two": "c3", "least open": "c0"}
_PLOTS = ("c0", "c1", "c2", "c4", "c6")
_SIGNALS = {
    ("rows", 0.5, 1.0): "rows/s, 50 % of full",
    ("rows", 0.6, 1.0): "rows/s, 60 %",
    ("rows", 0.7, 1.0): "rows/s, 70 %",
    ("open", 2.0, 1.0): "open requests, 2",
    ("waiting", 1.0, 0.05): "waiting requests, 1",
}

Line = Sequence[tuple[float, Sequence[SeedFigures]]]  # by load or seconds


def figure_svg(results: SimulationResults) -> str:
    """Draw p99 by load for each size of cluster, in bursts, after a loss, and with an autoscaler, as an SVG file."""
    sizes = sorted({point.size for point in results.loads if point.pattern == "poisson"})
    with rc_context({**STYLE, "legend.fontsize": 8}):
        figure = Figure(figsize=(3.1 * max(len(sizes), 3), 6.4), layout="constrained", facecolor="#ffffff")
        wide = max(len(sizes), 1)
        grid = figure.add_gridspec(2, 3 * wide)
        panels = [figure.add_subplot(grid[0, 3 * place : 3 * place + 3]) for place in range(len(sizes))]
        for axes, size in zip(panels, sizes, strict=True):
            _draw_balancers(axes, results, size)
        bursts, losses, scaling = (figure.add_subplot(grid[1, wide * at : wide * at + wide]) for at in range(3))
        _draw_bursts(bursts, results)
        _draw_losses(losses, results)
        _draw_scaling(scaling, results)
        for axes in (*panels[:1], bursts):
            axes.set_ylabel("p99 of latency, times an idle server's")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue().decode()


def load_line(results: SimulationResults, size: int, balancer: BalancerName, pattern: Pattern = "poisson") -> Line:
    """The runs by load."""
    wanted = (size, balancer, pattern)
    points = [point for point in results.loads if (point.size, point.balancer, point.pattern) == wanted]
    return sorted(((point.load, point.runs) for point in points), key=lambda pair: pair[0])


def loss_line(results: SimulationResults, size: int, lost: int) -> Line:
    """The runs by the load before the loss."""
    points = [point for point in results.losses if (point.size, point.lost_servers) == (size, lost)]
    return sorted(((point.load, point.runs) for point in points), key=lambda pair: pair[0])


def scaling_lines(results: SimulationResults) -> Iterator[tuple[tuple[str, float, float], list[ScalingPoint]]]:
    """The points of each signal, target and shrink, by the time that a server takes to start."""
    found: dict[tuple[str, float, float], list[ScalingPoint]] = {}
    for point in sorted(results.scaling, key=lambda one: one.scaling.start):
        key = (point.scaling.signal, point.scaling.target, point.scaling.shrink)
        found.setdefault(key, []).append(point)
    yield from found.items()


def _draw_balancers(axes: Axes, results: SimulationResults, size: int) -> None:
    _prepare(axes, f"{size} GPUs", "load of each GPU")
    for balancer, colour in _COLOURS.items():
        _draw(axes, load_line(results, size, balancer), balancer, colour)
    _add_legend(axes, loc="upper left")


def _draw_bursts(axes: Axes, results: SimulationResults) -> None:
    _prepare(axes, "bursts of 1.5 times the mean", "mean load of each GPU")
    sizes = sorted({point.size for point in results.loads if point.pattern == "bursty"})
    for size, colour in zip(sizes, _PLOTS, strict=False):
        _draw(axes, load_line(results, size, "least open", "bursty"), f"{size} GPUs", colour)
    _add_legend(axes, loc="upper left")


def _draw_losses(axes: Axes, results: SimulationResults) -> None:
    _prepare(axes, "the minute after GPUs are lost", "load of each GPU before")
    pairs = sorted({(point.size, point.lost_servers) for point in results.losses}, key=lambda one: one[1] / one[0])
    for (size, lost), colour in zip(pairs, _PLOTS, strict=False):
        _draw(axes, loss_line(results, size, lost), f"{lost} of {size} lost", colour)
    _add_legend(axes, loc="upper left")


def _draw_scaling(axes: Axes, results: SimulationResults) -> None:
    _prepare(axes, "the load doubles in 10 minutes; autoscaler by", "minutes until a new GPU serves")
    known = {key: points for key, points in scaling_lines(results) if key in _SIGNALS}
    for (key, name), colour in zip(_SIGNALS.items(), _PLOTS, strict=True):
        line = [(point.scaling.start / 60, point.runs) for point in known.get(key, [])]
        _draw(axes, line, name, colour)
    axes.set_xlim(0, 6.2)
    _add_legend(axes, loc="lower right", columns=2)  # below all lines


def _prepare(axes: Axes, title: str, label: str) -> None:
    axes.set(title=title, xlabel=label, ylim=(0, _TOP), yticks=range(0, int(_TOP) + 1, 2))
    axes.grid(axis="y")
    axes.axhline(LIMIT, color=PALETTE["ink"], linestyle=":", linewidth=1)


def _add_legend(axes: Axes, *, loc: Literal["upper left", "lower right"], columns: int = 1) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=loc, ncols=columns)


def _draw(axes: Axes, line: Line, name: str, colour: str) -> None:
    """The mean of all seeds, and the range of them."""
    xs = [x for x, _ in line]
    means = [_drawn(mean_p99(runs)) for _, runs in line]
    ranges = [[_drawn(run.p99) for run in runs] for _, runs in line]
    axes.plot(xs, means, color=PALETTE[colour], linewidth=1.5, marker="o", markersize=3, label=name, clip_on=True)
    axes.fill_between(xs, list(map(min, ranges)), list(map(max, ranges)), color=PALETTE[colour], alpha=0.2, linewidth=0)


def _drawn(value: float | None) -> float:
    return _TOP * 2 if value is None else value
