"""The report's charts, as data from the results of a run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from loadtest.analysis.results import (
    OUTCOMES,
    REST,
    STAGES,
    LoadMetrics,
    LoadTestSummary,
    MeasuredLoad,
    MetricsSample,
    Outcome,
    RequestRecord,
)
from loadtest.charts import (
    Chart,
    ChartAxis,
    ReferenceLine,
    Series,
    StackedBars,
    cumulative,
    linear_axis,
    log_axis,
    seconds,
)

_MAX_BINS = 48  # of time
_MIN_STAGE = 1e-4  # seconds: shorter stages are drawn there, for the axis is logarithmic
_COLOURS: dict[Outcome, int] = {"completed": 0, "refused": 1, "not ready": 3, "failed": 4, "client timeout": 6}


def latency_chart(summary: LoadTestSummary, points: Sequence[LoadMetrics]) -> Chart:
    """Chart latency percentiles over throughput."""
    measured = [(point.throughput, point.latency) for point in points if point.latency]
    curves = {
        "p50": [(x, latency.p50) for x, latency in measured],
        "p95": [(x, latency.p95) for x, latency in measured],
        "p99": [(x, latency.p99) for x, latency in measured],
    }
    values = [value for curve in curves.values() for _, value in curve]
    knee = next((point.throughput for point in points if is_knee(summary, point)), None)
    return Chart(
        linear_axis([point.throughput for point in points], "throughput, completed requests per second"),
        log_axis([*values, summary.slo], "latency, s"),
        [Series(name, curve, colour, "dots") for colour, (name, curve) in enumerate(curves.items())],
        lines=[ReferenceLine("y", summary.slo, f"latency target {seconds(summary.slo)}"), *_knee_line(knee)],
    )


def goodput_chart(summary: LoadTestSummary, points: Sequence[LoadMetrics]) -> Chart:
    """Chart goodput and throughput over the offered load."""
    offered = [point.offered for point in points]
    most = max(offered, default=0.0)
    knee = next((point.offered for point in points if is_knee(summary, point)), None)
    return Chart(
        linear_axis(offered, "offered load, requests per second"),
        linear_axis([*offered, *(point.throughput for point in points)], "requests per second"),
        [
            Series("offered", [(0.0, 0.0), (most, most)], 7, "dashes"),
            Series("throughput", [(point.offered, point.throughput) for point in points], 1, "dots"),
            Series("goodput", [(point.offered, point.goodput) for point in points], 0, "dots"),
        ],
        lines=_knee_line(knee),
    )


def is_knee(summary: LoadTestSummary, point: LoadMetrics) -> bool:
    """Whether `point` is the load at the knee."""
    return summary.knee is not None and point.load.rate == summary.knee


def stages_chart(requests: Sequence[RequestRecord]) -> Chart | None:
    """Chart the cumulative distributions of latency and of each stage; None if no request completed."""
    done = [one for one in requests if one.counted and one.outcome == "completed"]
    if not done:
        return None
    named = {stage: [(one.stages or {}).get(stage, 0.0) for one in done] for stage in STAGES}
    named[REST] = [one.rest for one in done]
    series = [Series("latency", cumulative([one.latency for one in done]), 0, "area")]
    for colour, (name, values) in enumerate(named.items(), 1):
        series.append(Series(name, cumulative([max(value, _MIN_STAGE) for value in values]), colour))
    if first_steps := [one.to_first_step for one in done if one.to_first_step is not None]:
        series.append(Series("first step", cumulative(first_steps), 7, "dashes"))
    x = log_axis([at for one in series for at, _ in one.points], "time, s")
    return Chart(x, ChartAxis("share of requests", 0.0, 1.0), series)


def step_rows_chart(point: LoadMetrics) -> Chart | None:
    """Chart the number of steps by their UNet rows; None if there was no step."""
    known = {rows: count for rows, count in point.step_rows.items() if count}
    if not known:
        return None
    bars = [(rows - 0.4, rows + 0.4, (float(count),)) for rows, count in known.items()]
    x = ChartAxis("UNet rows in a step", 0.5, max(point.step_rows) + 0.5)
    return Chart(x, linear_axis(list(known.values()), "steps"), bars=StackedBars(("steps",), (0,), bars))


def outcomes_chart(measured: MeasuredLoad) -> Chart:
    """Chart the rate of requests by outcome over the time at which they were due."""
    load, requests = measured.point.load, measured.requests
    bins = min(max(len(requests) // 5, 8), _MAX_BINS)
    width = load.end / bins
    rates = [dict.fromkeys(OUTCOMES, 0.0) for _ in range(bins)]
    for one in requests:
        rates[min(int(one.due / width), bins - 1)][one.outcome] += 1 / width
    seen = [outcome for outcome in OUTCOMES if any(rate[outcome] for rate in rates)]
    bars = [(index * width, (index + 1) * width, [rate[one] for one in seen]) for index, rate in enumerate(rates)]
    return Chart(
        _time_axis(measured.point),
        linear_axis([sum(rate.values()) for rate in rates], "requests per second"),
        bars=StackedBars(seen, [_COLOURS[outcome] for outcome in seen], bars),
        lines=_phase_lines(measured.point),
    )


def queue_chart(point: LoadMetrics) -> Chart:
    """Chart the server's waiting and running requests over time."""
    waiting = [(sample.at, sample.waiting) for sample in point.samples]
    running = [(sample.at, sample.running) for sample in point.samples]
    y = linear_axis([value for _, value in (*waiting, *running)] + [1.0], "requests")
    return _time_chart(point, y, [Series("waiting", waiting, 1, "area"), Series("running", running, 0)])


def cpu_chart(point: LoadMetrics) -> Chart | None:
    """Chart the CPU cores that the server's process uses over time; None if it does not export them."""
    samples = [(sample.at, sample.cpu) for sample in point.samples if sample.cpu is not None]
    if len(samples) < 2:
        return None
    cores = [
        (later, max(after - before, 0.0) / (later - earlier))
        for (earlier, before), (later, after) in pairwise(samples)
        if later > earlier
    ]
    y = linear_axis([value for _, value in cores], "CPU, cores")
    return _time_chart(point, y, [Series("cores", cores, 0, "area")])


def memory_chart(point: LoadMetrics) -> Chart | None:
    """Chart the resident memory of the server's process over time; None if it does not export it."""
    mebibytes = [(at, memory / 2**20) for at, memory in map(_memory, point.samples) if memory is not None]
    if not mebibytes:
        return None
    y = linear_axis([value for _, value in mebibytes], "resident memory, MiB")
    return _time_chart(point, y, [Series("MiB", mebibytes, 2, "area")])


def _memory(sample: MetricsSample) -> tuple[float, float | None]:
    return sample.at, sample.memory


def _time_chart(point: LoadMetrics, y: ChartAxis, series: Sequence[Series]) -> Chart:
    return Chart(_time_axis(point), y, series, lines=_phase_lines(point))


def _time_axis(point: LoadMetrics) -> ChartAxis:
    last = max([point.load.end, *(sample.at for sample in point.samples)])
    return ChartAxis("time since the load began, s", 0.0, last)


def _phase_lines(point: LoadMetrics) -> list[ReferenceLine]:
    counted = [ReferenceLine("x", point.load.warm_up, "counted from here")] if point.load.warm_up else []
    return [*counted, ReferenceLine("x", point.load.end, "load ends")]


def _knee_line(at: float | None) -> list[ReferenceLine]:
    return [] if at is None else [ReferenceLine("x", at, "knee")]
