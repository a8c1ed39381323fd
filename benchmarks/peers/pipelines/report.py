"""The tables of a comparison of pipelines, for the terminal and in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.peers.pipelines.results import Measurement, PipelineResults
from benchmarks.peers.pipelines.systems import EAGER, FULL_EAGER

_HEADINGS = (
    "system",
    "s per image",
    "× eager, small-SD",
    "× eager, SD 1.4",
    "start-up, s",
    "peak memory, GiB",
    "of eager's memory",
    "PSNR, dB",
)
_NOTHING = "–"


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """All measurements of a system at a size."""

    measurements: tuple[Measurement, ...]

    @property
    def seconds(self) -> float | None:
        """Median of an image."""
        values = [value for one in self.measurements for value in one.seconds]
        return statistics.median(values) if values else None

    @property
    def startup(self) -> float | None:
        values = [one.startup for one in self.measurements if one.startup is not None]
        return statistics.median(values) if values else None

    @property
    def peak(self) -> int | None:
        return max((one.peak_bytes for one in self.measurements if one.seconds), default=None)

    @property
    def psnr(self) -> float | None:
        """Of the image that is farthest from torch-eager's, dB."""
        return min((psnr_of(error) for one in self.measurements for error in one.errors), default=None)

    @property
    def note(self) -> str:
        return next((one.note for one in self.measurements if one.note), "")


def psnr_of(error: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared difference of colours 0 to 255."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def summarize(results: PipelineResults, system: str, size: str) -> SystemSummary:
    """The measurements of a system at a size."""
    return SystemSummary(tuple(one for one in results.measurements if (one.system, one.size) == (system, size)))


def table(results: PipelineResults, size: str, titles: Sequence[tuple[str, str]]) -> Table:
    """The systems that were measured at a size, for the terminal."""
    made = Table(title=f"{size}, {results.settings.sizes[size]} steps")
    made.add_column(_HEADINGS[0])
    for heading in _HEADINGS[1:]:
        made.add_column(heading, justify="right")
    for name, title in titles:
        if summarize(results, name, size).seconds is not None:
            made.add_row(title, *cells(results, name, size))
    return made


def page(results: PipelineResults, titles: Sequence[tuple[str, str]]) -> str:
    """Markdown: a table for each size, systems (name and title) in this order, and remarks."""
    return "\n".join([_head(results), *(_section(results, size, titles) for size in results.settings.sizes)]) + "\n"


def cells(results: PipelineResults, system: str, size: str) -> Iterator[str]:
    """A system's row, in the order of the headings."""
    own, small, full = (summarize(results, name, size) for name in (system, EAGER, FULL_EAGER))
    yield _number(own.seconds, "{:.2f}")
    yield _number(_divided(small.seconds, own.seconds), "{:.2f}×")
    yield _number(_divided(full.seconds, own.seconds), "{:.2f}×")
    yield _number(own.startup, "{:.1f}")
    yield _number(_divided(own.peak, 2**30), "{:.2f}")
    yield _number(_divided(own.peak, small.peak), "{:.0%}")
    yield "reference" if system == EAGER else _decibels(own.psnr)


def _head(results: PipelineResults) -> str:
    settings, run = results.settings, results.runs[-1]
    where = f"{run.environment.processor}, {run.environment.cores} cores, {run.began[:10]}"
    return f"# Comparison with other pipelines\n\n{where}. {settings.threads} threads each. `{run.command}`\n"


def _section(results: PipelineResults, size: str, titles: Sequence[tuple[str, str]]) -> str:
    steps = results.settings.sizes[size]
    lines = [f"## {size}, {steps} steps, guidance {results.settings.guidance:g}", ""]
    lines += [_row(_HEADINGS), _row(["---", *["--:"] * (len(_HEADINGS) - 1)])]
    missing = []
    for name, title in titles:
        found = summarize(results, name, size)
        if found.seconds is not None:
            lines.append(_row([title, *cells(results, name, size)]))
        elif found.measurements:
            missing.append(_row([title, f"not measured: {_one_line(found.note)}", *[_NOTHING] * (len(_HEADINGS) - 2)]))
    return "\n".join([*lines, *missing, *_remarks(results, size), ""])


def _remarks(results: PipelineResults, size: str) -> Iterator[str]:
    if size in results.seed_difference:
        decibels = _decibels(psnr_of(results.seed_difference[size]))
        yield f"\nFor scale: torch-eager's images of two seeds have a PSNR of {decibels} dB."


def _divided(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _number(value: float | None, pattern: str) -> str:
    return _NOTHING if value is None else pattern.format(value)


def _decibels(value: float | None) -> str:
    if value is not None and math.isinf(value):
        return "identical"
    return _number(value, "{:.1f}")


def _row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _one_line(text: str) -> str:
    """Text for a cell: without line breaks, and with its bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")
