"""A run of the load test: measures the loads that the options ask for, and summarizes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from loadtest.analysis.compare import compare, matches, too_short
from loadtest.analysis.results import LoadLevel, LoadMetrics, LoadTestSummary, MeasuredLoad, RequestRecord
from loadtest.analysis.sweep import died, is_overloaded, knee, next_rate
from loadtest.charts import seconds
from loadtest.client import LoadTestError, ServerClient
from loadtest.command_line import LoadTestOptions
from loadtest.generator import LoadGenerator, measure_idle_latencies
from loadtest.mix import Mix, choose_entries
from loadtest.provenance import Environment, Run, now
from loadtest.response_formats import RESPONSE_FORMATS

_TARGET = 4.0  # default latency target, times the idle latency
_FIRST_RATE = 0.25  # where a sweep begins, of what an idle server completes one by one
_MIN_REQUESTS = 100  # for a p99
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class RunObserver(Protocol):
    """What a run reports to while it goes on."""

    def begin_load(self, load: LoadLevel) -> Callable[[float], None]:
        """Return a function that is called with the seconds since `load` began."""

    def on_request(self, request: RequestRecord) -> None:
        """Handle a request that has ended."""


@dataclass(slots=True)
class LoadTestRun:
    """The server's metadata, the requests' mix and the loads measured so far."""

    provenance: Run
    models: list[dict[str, Any]]
    server_version: str | None
    mix: Mix
    idle_latencies: tuple[float, ...]  # seconds, for each entry
    latency_targets: tuple[float, ...]  # seconds, for each entry
    why_no_metrics: str | None
    loads: list[MeasuredLoad] = field(default_factory=list)

    @property
    def points(self) -> list[LoadMetrics]:
        return [one.point for one in self.loads]


@dataclass(frozen=True, slots=True)
class Baseline:
    """An earlier run, to compare with."""

    folder: Path
    summary: LoadTestSummary
    loads: Sequence[MeasuredLoad]


async def measure(options: LoadTestOptions, provenance: Run, observer: RunObserver) -> LoadTestRun:
    """Measure the server under all loads, in order of users and rate. Raises LoadTestError, MixError, OSError."""
    response_format = RESPONSE_FORMATS[options.format]
    async with ServerClient(
        options.url, timeout=options.timeout, servers=options.server, response_format=response_format
    ) as client:
        run = await _prepare(options, provenance, client)
        generator = LoadGenerator(
            client,
            run.mix,
            idle_latencies=run.idle_latencies,
            latency_targets=run.latency_targets,
            on_request=observer.on_request,
        )
        async for load in _loads(options, run):
            run.loads.append(await generator.run(load, len(run.loads), observer.begin_load(load)))
            if died(run.points):
                break
    run.loads.sort(key=lambda one: (one.point.load.users or 0, one.point.load.rate or 0.0))
    return run


async def _prepare(options: LoadTestOptions, provenance: Run, client: ServerClient) -> LoadTestRun:
    """Check the server and every entry of the mix, and measure idle latencies."""
    await client.check_ready()
    models = await client.models()
    examples = _examples(models, options.model)
    entries = choose_entries(options.mix, options.wanted, examples=lambda: examples)
    mix = Mix(entries, options.seed)
    idle = await measure_idle_latencies(client, mix)
    targets = tuple(options.slo if options.slo is not None else _TARGET * one for one in idle)
    return LoadTestRun(
        provenance, models, await client.version(), mix, idle, targets, why_no_metrics=await client.why_no_metrics()
    )


def _examples(models: Sequence[Mapping[str, Any]], named: Sequence[str]) -> Sequence[str]:
    """Return the examples of the first model that is named, or of the server's default."""
    chosen = [model for model in models if model["name"] == named[0]] if named else models
    return chosen[0]["examples"] if chosen else ()


async def _loads(options: LoadTestOptions, run: LoadTestRun) -> AsyncIterator[LoadLevel]:
    """Yield the loads, each once the previous one is measured."""
    if options.sweep:
        first = min(options.rate, default=_FIRST_RATE / run.mix.mean(run.idle_latencies))
        while (rate := next_rate(run.points, first=first, factor=options.factor)) is not None:
            yield options.load(rate=rate)
    else:
        for rate in options.rate:
            yield options.load(rate=rate)
    for users in options.users:
        yield options.load(users=users)


def summarize_run(options: LoadTestOptions, run: LoadTestRun, baseline: Baseline | None) -> LoadTestSummary:
    """Return the summary of a run, compared with `baseline` where there is one."""
    summary = LoadTestSummary(
        run=run.provenance.model_copy(update={"ended": now(), "environment": _with_client(run.provenance)}),
        url=options.url,
        response_format=options.format,
        server_version=run.server_version,
        models=run.models,
        seed=options.seed,
        slo=run.mix.mean(run.latency_targets),
        slo_given=options.slo is not None,
        entries=run.mix.entries,
        idle_latencies=run.idle_latencies,
        points=tuple(run.points),
        knee=knee(run.points),
        servers=options.server,
        notes=tuple(_notes(options, run)),
    )
    return _compare(summary, run.loads, baseline) if baseline else summary


def load_baseline(options: LoadTestOptions, folder: Path) -> Baseline:
    """Read an earlier run. Raises LoadTestError where it is missing or has none of the loads of `options`."""
    try:
        summary = LoadTestSummary.model_validate_json((folder / "summary.json").read_bytes())
        lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        requests = [RequestRecord.model_validate_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise LoadTestError(f"{folder} has no run to compare with: {error}") from None
    wanted = [*(options.load(rate=rate) for rate in options.rate), *(options.load(users=n) for n in options.users)]
    if not {load.label for load in wanted} & {point.load.label for point in summary.points}:
        present = ", ".join(point.load.label for point in summary.points)
        raise LoadTestError(f"{folder} has none of these loads, but {present}: give the same --rate or --users.")
    by_load = {point.number: tuple(one for one in requests if one.load == point.number) for point in summary.points}
    return Baseline(folder, summary, [MeasuredLoad(point, by_load[point.number]) for point in summary.points])


def _compare(summary: LoadTestSummary, loads: Sequence[MeasuredLoad], baseline: Baseline) -> LoadTestSummary:
    notes = [*summary.notes, *_comparison_notes(summary, loads, baseline)]
    compared = tuple(compare(baseline.loads, loads))
    update = {"baseline": str(baseline.folder), "compared": compared, "notes": tuple(notes)}
    return summary.model_copy(update=update)


def _comparison_notes(summary: LoadTestSummary, loads: Sequence[MeasuredLoad], baseline: Baseline) -> Iterator[str]:
    pairs = list(matches(baseline.loads, loads))
    same_loads = all(before.point.load == after.point.load for before, after in pairs)
    requests = [(one.response_format, one.seed, one.entries) for one in (baseline.summary, summary)]
    if not same_loads or requests[0] != requests[1]:
        yield "The earlier run sent other requests."
    if short := [after.point.load.label for before, after in pairs if too_short(before, after)]:
        yield f"Too short to compare latencies at {', '.join(short)}: use a longer --duration."


def _with_client(provenance: Run) -> Environment:
    packages = {**provenance.environment.packages, "httpx": version("httpx")}
    return provenance.environment.model_copy(update={"packages": dict(sorted(packages.items()))})


def _notes(options: LoadTestOptions, run: LoadTestRun) -> Iterator[str]:
    """Yield what limits the validity of the metrics."""
    points = run.points
    if run.why_no_metrics:
        yield (
            f"{run.why_no_metrics}: charts of them are left out, and a server that dies is not noticed. "
            "Behind a balancer, name each server with --server."
        )
    for point in points:
        if point.lost is not None:
            yield (
                f"The server died under the load {point.load.label}, {seconds(point.lost)} after it began: "
                "this run does not say what it sustains. Its log has the reason."
            )
    for point in points:
        if not point.kept_up and point.late:
            late = seconds(point.late.p99)
            yield f"At {point.load.label} the client could not keep up: it was {late} late (p99). Run it elsewhere."
    if urlsplit(options.url).hostname in _LOCAL_HOSTS:
        yield "Client and server shared a machine and competed for its CPU."
    few = [point.load.label for point in points if point.requests < _MIN_REQUESTS]
    if few:
        yield f"Fewer than {_MIN_REQUESTS} requests count at {', '.join(few)}: p99 there is close to the maximum."
    if options.sweep and not is_overloaded(points):
        yield "The sweep ended before the server was overloaded: begin it at a higher --rate."
