"""The comparison of servers as a table and as a picture. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.peers.servers_results import SCENARIOS, SLO, Record, Result, Scenario
from engines.accuracy import IDENTICAL
from loadtest.html import seconds
from loadtest.results import Point
from loadtest.svg import Axis, Mark, Series, chart, over

_TOLD: dict[Scenario, str] = {
    "same": "all requests alike, but for prompts and seeds",
    "mixed": "steps, schedulers and guidance differ",
}
_ROW = ("server", "rate", "requests", "throughput", "goodput", "p50", "p95", "refused", "failed", "timeouts")
_ABOUT = ("server", "ready after", "one picture, idle", "peak memory", "PSNR", "")
_COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7")
_WIDTH, _HEIGHT, _HEAD = 620, 300, 62
_STYLE = (
    "text{fill:#6b6a66;font:12px system-ui,sans-serif}.title,.said{fill:#1c1c1a}.title{font-size:14px}"
    ".grid{stroke:#e3e2de}.tick{stroke:#6b6a66}.mark{stroke:#1c1c1a;stroke-dasharray:3 4}"
    ".dot{stroke:#fff;stroke-width:2}"
)


def table(record: Record, titles: Sequence[tuple[str, str]]) -> str:
    """serving.md, of the servers with these names and titles."""
    about = ["| " + " | ".join(cells) + " |" for cells in _servers(record, titles)]
    parts = [f"# Servers under load\n\n{_machine(record)}\n", *about, ""]
    for scenario in _measured(record):
        parts += [f"## {scenario}: {_TOLD[scenario]}\n", _terms(record, scenario), ""]
        parts += ["| " + " | ".join(cells) + " |" for cells in _rows(record, scenario, titles)]
        parts.append("")
    return "\n".join(parts)


def picture(record: Record, titles: Sequence[tuple[str, str]]) -> str:
    """serving.svg: the 95th percentile of latency by rate, a panel for each scenario."""
    named = [(name, title) for name, title in titles if (found := record.find(name)) and found.loads]
    panels = [_panel(record, scenario, named) for scenario in _measured(record)]
    width, height = _WIDTH * max(len(panels), 1), _HEIGHT + _HEAD
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *_legend(named),
            *(f'<g transform="translate({number * _WIDTH} {_HEAD})">{one}</g>' for number, one in enumerate(panels)),
            "</svg>\n",
        ]
    )


def _measured(record: Record) -> list[Scenario]:
    return [scenario for scenario in SCENARIOS if record.idle(scenario) is not None]


def _machine(record: Record) -> str:
    run = record.runs[-1]
    where, settings = run.environment, record.settings
    versions = {**{name: where.packages.get(name) for name in ("latentd", "onnxruntime", "openvino")}, **record.peers}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{where.processor}, {where.cores} cores, {settings.threads} threads for each server; {told}. "
        f"{run.began[:10]}, by `{run.command}`"
    )


def _terms(record: Record, scenario: Scenario) -> str:
    idle, settings = record.idle(scenario) or 0.0, record.settings
    rates = ", ".join(f"{rate / idle:.3g}" for rate in settings.rates)
    return (
        f"The yardstick takes {seconds(idle)} for a request when idle. Callers come at {rates} per second for "
        f"{settings.seconds:g} s. Good is an answer within {seconds(SLO * idle)}."
    )


def _servers(record: Record, titles: Sequence[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    yield _ABOUT
    yield ("---", *("--:",) * (len(_ABOUT) - 2), "---")
    for name, title in titles:
        if found := record.find(name):
            yield (title, *_about(record, found), found.note.replace("|", "\\|"))


def _about(record: Record, result: Result) -> Iterator[str]:
    first = result.loads[0] if result.loads else None
    yield seconds(result.ready_after) if result.ready_after else "–"
    yield seconds(record.mix(first.scenario).mean(first.alone)) if first else "–"
    yield f"{result.memory / 2**20:.0f} MiB" if result.memory else "–"
    if result.psnr is None:
        yield "–"
    else:
        yield "the same" if result.psnr == IDENTICAL else f"{result.psnr:.1f} dB"


def _rows(record: Record, scenario: Scenario, titles: Sequence[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    yield _ROW
    yield ("---", *("--:",) * (len(_ROW) - 1))
    for name, title in titles:
        found = record.find(name)
        under = found.under(scenario) if found else None
        for share, point in zip(record.settings.rates, under.points if under else (), strict=False):
            yield (title, *_cells(share, point))


def _cells(share: float, point: Point) -> Iterator[str]:
    yield f"{share:g}×, {point.load.label}"
    yield str(point.requests)
    yield from (f"{value:.2f}/s" for value in (point.throughput, point.goodput))
    yield from (seconds(value) for value in (point.latency.p50, point.latency.p95)) if point.latency else ("–", "–")
    yield str(point.outcomes["refused"])
    yield str(point.outcomes["failed"] + point.outcomes["not ready"])
    yield str(point.outcomes["client timeout"])


def _panel(record: Record, scenario: Scenario, named: Sequence[tuple[str, str]]) -> str:
    shares, slo = record.settings.rates, SLO * (record.idle(scenario) or 0.0)
    series = []
    for number, (name, title) in enumerate(named):
        found = record.find(name)
        under = found.under(scenario) if found else None
        told = zip(shares, under.points if under else (), strict=False)
        pairs = [(share, point.latency.p95) for share, point in told if point.latency]
        series.append(Series(title, pairs, number, "dots"))
    heights = [height for one in series for _, height in one.points]
    x = Axis("callers, of what the yardstick draws one after the other", min(shares) * 0.8, max(shares) * 1.1)
    drawn = chart(
        x, over([*heights, slo], "p95 of latency, s"), series, marks=[Mark("y", slo, f"good: {seconds(slo)}")]
    )
    head = f'<text class="title" x="4" y="-12">{scenario}: {escape(_TOLD[scenario])}</text>'
    # Alone on a page, it has neither the page's colours nor room for its legend of HTML.
    inside = re.sub(r"^.*?<svg[^>]*>|</svg>$", "", drawn, flags=re.DOTALL)
    return head + re.sub(r"var\(--c(\d)\)", lambda found: _COLOURS[int(found[1]) % len(_COLOURS)], inside)


def _legend(named: Sequence[tuple[str, str]]) -> Iterator[str]:
    at = 8.0
    for number, (_, title) in enumerate(named):
        yield f'<rect x="{at:.0f}" y="10" width="10" height="10" rx="3" fill="{_COLOURS[number % len(_COLOURS)]}"/>'
        yield f'<text x="{at + 15:.0f}" y="19">{escape(title)}</text>'
        at += 40 + 6.6 * len(title)
