"""The tables that a run prints: narrow enough for a terminal of 80 columns, and never with a digit cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from loadtest.analysis.results import LoadMetrics, LoadTestSummary
from loadtest.charts import seconds
from loadtest.report.figures import is_knee


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table of loads: its heading, and what it says of a load."""

    heading: str
    cell: Callable[[LoadMetrics, LoadTestSummary], str]


def _percentile(name: str) -> _Column:
    return _Column(name, lambda point, _: seconds(getattr(point.latency, name)) if point.latency else "–")


def _rate(name: str) -> _Column:
    return _Column(name, lambda point, _: f"{getattr(point, name):.2f}/s")


def _load_name(point: LoadMetrics, summary: LoadTestSummary) -> str:
    return point.load.label + (" [bold]knee[/]" if is_knee(summary, point) else "")


def _late(point: LoadMetrics, _: LoadTestSummary) -> str:
    late = seconds(point.late.p99) if point.late else "–"
    return late if point.kept_up else f"[red]{late}[/]"


_UNBOUNDED = Console(width=10_000)
_WORDS = ("load", "metric")
_LOAD = _Column("load", _load_name)
_RATES = (
    _Column("requests", lambda point, _: str(point.requests)),
    *map(_rate, ("offered", "throughput", "goodput")),
)
_LATENCIES = tuple(map(_percentile, ("p50", "p90", "p95", "p99")))
_FAILURES = (
    _Column("refused", lambda point, _: str(point.outcomes["refused"])),
    _Column("other\nfailures", lambda point, _: str(point.other_failures)),
    _Column("client\nlate", _late),
)


def metrics_tables(summary: LoadTestSummary, console: Console) -> list[Table]:
    """Return a table with a line for each load; two tables where one is wider than `console`, for no digit is cut."""
    title = f"{escape(summary.url)}: latency target {seconds(summary.slo)}"
    whole = _metrics_table(summary, (_LOAD, *_RATES, *_LATENCIES, *_FAILURES), title)
    if (whole.width or 0) <= console.width:
        return [whole]
    return [
        _metrics_table(summary, (_LOAD, *_RATES, *_FAILURES), title),
        _metrics_table(summary, (_LOAD, *_LATENCIES), "latency of completed requests"),
    ]


def _metrics_table(summary: LoadTestSummary, columns: Sequence[_Column], title: str) -> Table:
    table = _table(title, [column.heading for column in columns])
    for point in summary.points:
        table.add_row(*(column.cell(point, summary) for column in columns))
    return _unwrapped(table)


def _unwrapped(table: Table) -> Table:
    """Give `table` the width that its cells need, whatever the terminal's is."""
    table.width = Measurement.get(_UNBOUNDED, _UNBOUNDED.options, table).maximum
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    """Return a table with lines under its headings only, whose cells are neither wrapped nor cut."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=heading not in _WORDS)
    return table


def comparison_table(summary: LoadTestSummary) -> Table:
    """Return a table with a line for each metric that was compared."""
    headings = ("load", "metric", "before", "now", "ratio, 99 % interval", "")
    table = _table(f"compared with {escape(summary.baseline or '')}", headings)
    for one in summary.compared:
        values = (f"{value:.3g}" for value in (one.before, one.after))
        table.add_row(one.load, one.figure, *values, one.ratio_text, "[red]regressed[/]" if one.regressed else "")
    return _unwrapped(table)
