"""Generates load, an open loop of Poisson arrivals or a closed loop of users, and samples the server's metrics."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.analysis.results import LoadLevel, MeasuredLoad, MetricsSample, RequestRecord, rows_between, summarize
from loadtest.arrivals import poisson
from loadtest.client import LoadTestError, MetricsScrape, ServerClient, ServerLost
from loadtest.mix import Mix, abridged
from loadtest.response_formats import RequestResult

OnRequest = Callable[[RequestRecord], None]
OnProgress = Callable[[float], None]  # seconds into the load

_MAX_SAMPLES = 240  # of the server's metrics, per load
_MIN_INTERVAL = 0.25  # seconds between samples
_IDLE_REQUESTS = 24  # budget for measuring idle latencies, not counting the first request of each entry


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request of a load: its number, when it is due (seconds after the load began), and its entry of the mix."""

    number: int
    due: float
    entry: int


def request_schedule(load: LoadLevel, mix: Mix) -> Iterator[ScheduledRequest]:
    """Yield the open loop's requests in order; the same seed and rate give the same schedule."""
    if not load.rate:
        return
    times = poisson(rate=load.rate, seconds=load.end, steps=(1, 1), seed=mix.seed)
    for number, arrival in enumerate(times):
        yield ScheduledRequest(number, arrival.at, mix.pick(number))


async def measure_idle_latencies(client: ServerClient, mix: Mix) -> tuple[float, ...]:
    """Return the median latency of each entry on an idle server, in seconds.

    The first request of an entry checks that the server accepts it, and does not count.
    Raises LoadTestError with the server's message where an entry fails.
    """
    repeats = max(1, min(3, _IDLE_REQUESTS // len(mix.entries)))
    numbers = itertools.count(2**31)  # seeds that the load does not use
    medians = []
    for index in range(len(mix.entries)):
        spent = [await _idle_latency(client, mix, index, next(numbers)) for _ in range(1 + repeats)]
        medians.append(float(np.median(spent[1:])))
    return tuple(medians)


async def _idle_latency(client: ServerClient, mix: Mix, index: int, number: int) -> float:
    began = time.perf_counter()
    result = await client.send(mix.fields(index, number))
    spent = time.perf_counter() - began
    if result.outcome != "completed":
        status = f" ({result.status})" if result.status else ""
        raise LoadTestError(f"{mix.entries[index].name}: {result.outcome}{status}: {result.detail}")
    return spent


class LoadGenerator:
    """Runs loads against a server one after another; each begins when all requests of the previous one have ended.

    `idle_latencies` and `latency_targets` are seconds, one for each entry of the mix. `on_request` is called with
    each request when it ends.
    """

    def __init__(
        self,
        client: ServerClient,
        mix: Mix,
        *,
        idle_latencies: Sequence[float],
        latency_targets: Sequence[float],
        on_request: OnRequest,
    ) -> None:
        self._client = client
        self._mix = mix
        self._idle_latencies = idle_latencies
        self._latency_targets = latency_targets
        self._on_request = on_request

    async def run(self, load: LoadLevel, number: int, on_progress: OnProgress) -> MeasuredLoad:
        """Run `load`, whose requests are recorded under `number`, until its last request has ended.

        It ends early where the server dies, and the metrics then say when that was seen.
        """
        active = _ActiveLoad(load, number, time.perf_counter())
        rows: dict[int, int] = {}
        lost = None
        try:
            before = await self._scrape(active)
            await self._send_all(active, on_progress)
            after = await self._scrape(active)
            rows = rows_between(before.step_rows, after.step_rows) if before and after else {}
        except* ServerLost:
            lost = active.now
        metrics = summarize(load, number, active.requests, samples=active.samples, step_rows=rows, lost=lost)
        return MeasuredLoad(metrics, tuple(active.requests))

    async def _send_all(self, active: _ActiveLoad, on_progress: OnProgress) -> None:
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample(active, on_progress))
            async with asyncio.TaskGroup() as requests:
                await (self._open_loop if active.load.rate else self._closed_loop)(active, requests)
            sampling.cancel()

    async def _scrape(self, active: _ActiveLoad) -> MetricsScrape | None:
        """Read the servers' metrics. Raises ServerLost where one has died, or is not the process of before."""
        scrape = await self._client.scrape()
        if scrape and active.processes not in (None, scrape.processes):
            raise ServerLost("a server was started again")
        active.processes = scrape.processes if scrape else active.processes
        return scrape

    async def _open_loop(self, active: _ActiveLoad, group: asyncio.TaskGroup) -> None:
        for request in request_schedule(active.load, self._mix):
            await asyncio.sleep(max(request.due - active.now, 0.0))
            group.create_task(self._send(active, request))

    async def _closed_loop(self, active: _ActiveLoad, group: asyncio.TaskGroup) -> None:
        numbers = itertools.count()
        for _ in range(active.load.users or 0):
            group.create_task(self._user(active, numbers))

    async def _user(self, active: _ActiveLoad, numbers: Iterator[int]) -> None:
        """Send requests one after another: at once after an image, after a pause otherwise."""
        while (due := active.now) < active.load.end:
            number = next(numbers)
            result = await self._send(active, ScheduledRequest(number, due, self._mix.pick(number)))
            await asyncio.sleep(result.pause)

    async def _send(self, active: _ActiveLoad, request: ScheduledRequest) -> RequestResult:
        fields = self._mix.fields(request.entry, request.number)
        began = active.now
        result = await self._client.send(fields)
        record = RequestRecord(
            load=active.number,
            number=request.number,
            entry=request.entry,
            due=request.due,
            sent=began,
            ended=active.now,
            outcome=result.outcome,
            counted=active.load.warm_up <= request.due < active.load.end,
            idle_latency=self._idle_latencies[request.entry],
            latency_target=self._latency_targets[request.entry],
            status=result.status,
            retry_after=result.retry_after,
            detail=result.detail,
            stages=result.stages,
            first_step=None if result.first_step is None else began + result.first_step,
            fields=abridged(fields),
        )
        active.requests.append(record)
        self._on_request(record)
        return result

    async def _sample(self, active: _ActiveLoad, on_progress: OnProgress) -> None:
        interval = max(_MIN_INTERVAL, active.load.end / _MAX_SAMPLES)
        while True:
            at = active.now
            on_progress(at)
            if scrape := await self._scrape(active):
                active.samples.append(_metrics_sample(at, scrape))
            await asyncio.sleep(max(at + interval - active.now, 0.01))


class _ActiveLoad:
    """A load while it runs, with the requests that have ended and the metrics sampled so far."""

    def __init__(self, load: LoadLevel, number: int, began: float) -> None:
        self.load = load
        self.number = number
        self.requests: list[RequestRecord] = []
        self.samples: list[MetricsSample] = []
        self.processes: tuple[float | None, ...] | None = None  # of the servers, once they are known
        self._began = began

    @property
    def now(self) -> float:
        """Seconds after the load began."""
        return time.perf_counter() - self._began


def _metrics_sample(at: float, scrape: MetricsScrape) -> MetricsSample:
    gauges = scrape.gauges
    return MetricsSample(
        at=at,
        waiting=gauges.get("latentd_requests_waiting", 0.0),
        running=gauges.get("latentd_requests_running", 0.0),
        cpu=gauges.get("process_cpu_seconds_total"),
        memory=gauges.get("process_resident_memory_bytes"),
    )
