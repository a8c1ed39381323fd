"""The comparison of servers as a table and a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.peers.servers.results import SCENARIOS, SLO, Scenario, ServerResult, ServingResults
from engines.accuracy import IDENTICAL
from loadtest.analysis.results import LoadMetrics
from loadtest.charts import Chart, ChartAxis, ReferenceLine, Series, log_axis, seconds, standalone_svg

_TOLD: dict[Scenario, str] = {
    "same": "requests alike except for prompts and seeds",
    "mixed": "steps, schedulers and guidance differ",
}
_ROW = ("server", "rate", "requests", "throughput", "goodput", "p50", "p95", "refused", "failed", "timeouts")
_ABOUT = ("server", "ready after", "one image, idle", "peak memory", "PSNR", "")


def table(record: ServingResults, titles: Sequence[tuple[str, str]]) -> str:
    """serving.md, of the servers with these names and titles."""
    about = ["| " + " | ".join(cells) + " |" for cells in _servers(record, titles)]
    parts = [f"# Servers under load\n\n{_machine(record)}\n", *about, ""]
    for scenario in _measured(record):
        parts += [f"## {scenario}: {_TOLD[scenario]}\n", _terms(record, scenario), ""]
        parts += ["| " + " | ".join(cells) + " |" for cells in _rows(record, scenario, titles)]
        parts.append("")
    return "\n".join(parts)


def chart(record: ServingResults, titles: Sequence[tuple[str, str]]) -> str:
    """serving.svg: the 95th percentile of latency by rate, a panel for each scenario."""
    named = [(name, title) for name, title in titles if (found := record.find(name)) and found.loads]
    return standalone_svg([_panel(record, scenario, named) for scenario in _measured(record)])


def _measured(record: ServingResults) -> list[Scenario]:
    return [scenario for scenario in SCENARIOS if record.idle(scenario) is not None]


def _machine(record: ServingResults) -> str:
    run = record.runs[-1]
    where, settings = run.environment, record.settings
    versions = {**{name: where.packages.get(name) for name in ("latentd", "onnxruntime", "openvino")}, **record.peers}
    versions_text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{where.processor}, {where.cores} cores, {settings.threads} threads for each server; {versions_text}. "
        f"{run.began[:10]}, by `{run.command}`"
    )


def _terms(record: ServingResults, scenario: Scenario) -> str:
    idle, settings = record.idle(scenario) or 0.0, record.settings
    rates = ", ".join(f"{rate / idle:.3g}" for rate in settings.rates)
    return (
        f"The yardstick takes {seconds(idle)} for a request when idle. Requests arrive at {rates} per second for "
        f"{settings.seconds:g} s. Goodput counts responses within {seconds(SLO * idle)}."
    )


def _servers(record: ServingResults, titles: Sequence[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    yield _ABOUT
    yield ("---", *("--:",) * (len(_ABOUT) - 2), "---")
    for name, title in titles:
        if found := record.find(name):
            yield (title, *_about(record, found), found.note.replace("|", "\\|"))


def _about(record: ServingResults, result: ServerResult) -> Iterator[str]:
    first = result.loads[0] if result.loads else None
    yield seconds(result.ready_after) if result.ready_after else "–"
    yield seconds(record.mix(first.scenario).mean(first.alone)) if first else "–"
    yield f"{result.memory / 2**20:.0f} MiB" if result.memory else "–"
    if result.psnr is None:
        yield "–"
    else:
        yield "identical" if result.psnr == IDENTICAL else f"{result.psnr:.1f} dB"


def _rows(record: ServingResults, scenario: Scenario, titles: Sequence[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    yield _ROW
    yield ("---", *("--:",) * (len(_ROW) - 1))
    for name, title in titles:
        found = record.find(name)
        under = found.under(scenario) if found else None
        for share, point in zip(record.settings.rates, under.points if under else (), strict=False):
            yield (title, *_cells(share, point))


def _cells(share: float, point: LoadMetrics) -> Iterator[str]:
    yield f"{share:g}×, {point.load.label}"
    yield str(point.requests)
    yield from (f"{value:.2f}/s" for value in (point.throughput, point.goodput))
    yield from (seconds(value) for value in (point.latency.p50, point.latency.p95)) if point.latency else ("–", "–")
    yield str(point.outcomes["refused"])
    yield str(point.outcomes["failed"] + point.outcomes["not ready"])
    yield str(point.outcomes["client timeout"])


def _panel(record: ServingResults, scenario: Scenario, named: Sequence[tuple[str, str]]) -> Chart:
    shares, slo = record.settings.rates, SLO * (record.idle(scenario) or 0.0)
    series = []
    for number, (name, title) in enumerate(named):
        found = record.find(name)
        under = found.under(scenario) if found else None
        measured = zip(shares, under.points if under else (), strict=False)
        pairs = [(share, point.latency.p95) for share, point in measured if point.latency]
        series.append(Series(title, pairs, number, "dots"))
    return Chart(
        ChartAxis(
            "request rate, relative to the yardstick's sequential throughput", min(shares) * 0.8, max(shares) * 1.1
        ),
        log_axis([*(height for one in series for _, height in one.points), slo], "p95 of latency, s"),
        series,
        lines=[ReferenceLine("y", slo, f"latency target {seconds(slo)}")],
        title=f"{scenario}: {_TOLD[scenario]}",
    )
