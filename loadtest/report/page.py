"""report.html: a run as one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.analysis.results import ComparedMetric, LoadMetrics, LoadTestSummary, MeasuredLoad
from loadtest.analysis.sweep import knee_text
from loadtest.charts import Chart, inline_svg, seconds
from loadtest.report.figures import (
    cpu_chart,
    goodput_chart,
    is_knee,
    latency_chart,
    memory_chart,
    outcomes_chart,
    queue_chart,
    stages_chart,
    step_rows_chart,
)

_MAX_FIELD = 120  # characters of a request's field
_LATENCY_CAPTION = (
    "Of completed requests, since they were due. Where the curve climbs or turns back, the server is at its limit."
)


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table of text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """A chart with its heading and caption; `missing` is what the page says where there is no chart."""

    title: str
    caption: str
    chart: Chart | None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class LoadSection:
    """The page's part on one load."""

    heading: str
    is_open: bool
    figures: Sequence[ReportFigure]


def render_report(summary: LoadTestSummary, loads: Sequence[MeasuredLoad]) -> str:
    """Return the page. Everything in it is escaped: error messages and prompts are the server's and the caller's."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - needed at the end of a run only
    from markupsafe import Markup  # noqa: PLC0415

    names = itertools.count()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["seconds"] = seconds
    environment.filters["svg"] = lambda chart: Markup(inline_svg(chart, name=f"chart{next(names)}"))  # noqa: S704 - matplotlib escapes
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    points = [one.point for one in loads]
    return template.render(
        title=_title(summary),
        summary=summary,
        about=_about(summary),
        knee=knee_text(summary.points, summary.knee),
        comparison=_comparison(summary),
        worse=sum(one.regressed for one in summary.compared),
        overview=list(_overview(summary, points)),
        metrics=_metrics(summary, points),
        sections=[_section(summary, one, is_last=one is loads[-1]) for one in loads],
        entries=_entries(summary),
    )


def _title(summary: LoadTestSummary) -> str:
    model = summary.models[0]["name"] if summary.models else "?"
    return f"Load on {model}, {summary.run.began[:16].replace('T', ' ')}"


def _about(summary: LoadTestSummary) -> list[str]:
    environment = summary.run.environment
    models = ", ".join(f"{one['name']}, {one['backend']} in {one['precision']}" for one in summary.models)
    return [
        f"{summary.url}: {models}, latentd {summary.server_version or 'of unknown version'}",
        f"Client: {environment.processor}, {environment.cores} cores, {environment.system}, "
        f"Python {environment.python}",
    ]


def _overview(summary: LoadTestSummary, points: Sequence[LoadMetrics]) -> Iterator[ReportFigure]:
    open_loop = [point for point in points if point.load.rate]
    closed_loop = [point for point in points if point.load.users]
    if open_loop:
        yield ReportFigure("Latency by throughput", _LATENCY_CAPTION, latency_chart(summary, open_loop))
        caption = "Requests completed within the latency target, and all completed, compared with those offered."
        yield ReportFigure("Goodput by offered load", caption, goodput_chart(summary, open_loop))
    if closed_loop:
        title = "Latency by throughput, closed loop of users"
        yield ReportFigure(title, _LATENCY_CAPTION, latency_chart(summary, closed_loop))


def _metrics(summary: LoadTestSummary, points: Sequence[LoadMetrics]) -> ReportTable:
    heads = ("load", "requests", "offered /s", "throughput /s", "goodput /s", "p50", "p90", "p95", "p99", "refused")
    return ReportTable(
        [*heads, "other failures", "client late, p99"], [list(_metrics_row(summary, point)) for point in points]
    )


def _metrics_row(summary: LoadTestSummary, point: LoadMetrics) -> Iterator[str]:
    yield point.load.label + (" (the knee)" if is_knee(summary, point) else "")
    yield str(point.requests)
    yield from (f"{value:.2f}" for value in (point.offered, point.throughput, point.goodput))
    one = point.latency
    yield from (seconds(value) for value in (one.p50, one.p90, one.p95, one.p99)) if one else ("–",) * 4
    yield str(point.outcomes["refused"])
    yield str(point.other_failures)
    yield f"{seconds(point.late.p99)}{'' if point.kept_up else ' !'}" if point.late else "–"


def _comparison(summary: LoadTestSummary) -> ReportTable:
    rows = [
        [one.load, one.figure, _value(one, one.before), _value(one, one.after), one.ratio_text, _verdict(one)]
        for one in summary.compared
    ]
    return ReportTable(("load", "metric", "before", "now", "ratio, 99 % interval", ""), rows)


def _value(one: ComparedMetric, value: float) -> str:
    return seconds(value) if one.figure.startswith("p") else f"{value:.2f}/s"


def _verdict(one: ComparedMetric) -> str:
    return "regressed" if one.regressed else ""


def _section(summary: LoadTestSummary, measured: MeasuredLoad, *, is_last: bool) -> LoadSection:
    """Return a load's section; those of the knee and of the highest load are open."""
    point, at_knee = measured.point, is_knee(summary, measured.point)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in point.outcomes.items() if count) or "no requests"
    heading = f"{point.load.label}: {outcomes}{' (the knee)' if at_knee else ''}"
    return LoadSection(heading, is_last or at_knee, list(_figures(measured)))


def _figures(measured: MeasuredLoad) -> Iterator[ReportFigure]:
    point = measured.point
    yield ReportFigure(
        "Latency by stage",
        "Share of requests that took at most this long, in total and in each stage.",
        stages_chart(measured.requests),
        "No request completed.",
    )
    caption = "Steps by the number of UNet rows batched in them, over the whole load."
    yield ReportFigure("Rows per step", caption, step_rows_chart(point), "No step was measured.")
    caption = "Requests per second by outcome, at the time they were due."
    yield ReportFigure("Outcomes over time", caption, outcomes_chart(measured))
    yield ReportFigure("Waiting and running requests", "From the server's metrics.", queue_chart(point))
    missing = "The server's /metrics does not export it."
    yield ReportFigure("CPU of the server", "Cores in use by its process.", cpu_chart(point), missing)
    yield ReportFigure("Memory of the server", "Resident memory of its process.", memory_chart(point), missing)


def _entries(summary: LoadTestSummary) -> ReportTable:
    rows = [
        [
            entry.name,
            f"{entry.weight:g}",
            seconds(latency),
            ", ".join(f"{name} {value!r}"[:_MAX_FIELD] for name, value in entry.fields.items()),
        ]
        for entry, latency in zip(summary.entries, summary.idle_latencies, strict=True)
    ]
    return ReportTable(("entry", "weight", "latency on an idle server", "fields"), rows)
