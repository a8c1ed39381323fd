"""Load: callers who come when they are due, or users who wait for each other's pictures, and who watches them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.arrivals import poisson
from loadtest.client import Node, Scrape, Unusable
from loadtest.mix import Mix, abridged
from loadtest.response_formats import Answer
from loadtest.results import Load, Measured, Sample, Sent, rows_between, sum_up

Hear = Callable[[Sent], None]
Tell = Callable[[float], None]  # seconds into the load

_SAMPLES = 240  # of the metrics in a load, at most
_EVERY = 0.25  # seconds between them, at least
_ALONE = 24  # requests for idle latencies, beside the first of each entry


@dataclass(frozen=True, slots=True)
class Caller:
    """Who comes, and when: seconds after the load began."""

    number: int
    due: float
    entry: int


def callers(load: Load, mix: Mix) -> Iterator[Caller]:
    """The open loop's callers: the same for the same seed and rate."""
    if not load.rate:
        return
    times = poisson(rate=load.rate, seconds=load.end, steps=(1, 1), seed=mix.seed)
    for number, arrival in enumerate(times):
        yield Caller(number, arrival.at, mix.pick(number))


async def measure_alone(node: Node, mix: Mix) -> tuple[float, ...]:
    """Seconds of each entry on an idle server: medians of a few, after one that also checks what is asked.

    Raises Unusable with the server's own words where it does not take an entry.
    """
    runs = max(1, min(3, _ALONE // len(mix.entries)))
    numbers = itertools.count(2**31)  # seeds that the load does not use
    seconds = []
    for index, entry in enumerate(mix.entries):
        spent = []
        for _ in range(1 + runs):
            began = time.perf_counter()
            answer = await node.send(mix.fields(index, next(numbers)))
            spent.append(time.perf_counter() - began)
            if answer.outcome != "completed":
                status = f" ({answer.status})" if answer.status else ""
                raise Unusable(f"{entry.name}: {answer.outcome}{status}: {answer.detail}")
        seconds.append(float(np.median(spent[1:])))
    return tuple(seconds)


class Driver:
    """Puts loads on a node, one after the other; each begins when all of the last have ended."""

    def __init__(self, node: Node, mix: Mix, *, alone: Sequence[float], accepted: Sequence[float], hear: Hear) -> None:
        self._node = node
        self._mix = mix
        self._alone = alone
        self._accepted = accepted
        self._hear = hear

    async def put(self, load: Load, number: int, tell: Tell) -> Measured:
        """`load`, which is the `number`th, to its last ending."""
        before = await self._node.scrape()
        under = _Under(load, number, time.perf_counter())
        watching = asyncio.create_task(self._watch(under, tell))
        try:
            async with asyncio.TaskGroup() as group:
                await (self._open(under, group) if load.rate else self._closed(under, group))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        after = await self._node.scrape()
        rows = rows_between(before.step_rows, after.step_rows) if before and after else {}
        point = sum_up(load, number, under.sent, samples=under.samples, step_rows=rows)
        return Measured(point, tuple(under.sent))

    async def _open(self, under: _Under, group: asyncio.TaskGroup) -> None:
        for caller in callers(under.load, self._mix):
            await asyncio.sleep(max(caller.due - under.now, 0.0))
            group.create_task(self._send(under, caller))

    async def _closed(self, under: _Under, group: asyncio.TaskGroup) -> None:
        numbers = itertools.count()
        for _ in range(under.load.users or 0):
            group.create_task(self._use(under, numbers))

    async def _use(self, under: _Under, numbers: Iterator[int]) -> None:
        """One user, who asks again as soon as there is a picture, and after a pause where there is none."""
        while (due := under.now) < under.load.end:
            number = next(numbers)
            answer = await self._send(under, Caller(number, due, self._mix.pick(number)))
            await asyncio.sleep(answer.pause)

    async def _send(self, under: _Under, caller: Caller) -> Answer:
        fields = self._mix.fields(caller.entry, caller.number)
        began = under.now
        answer = await self._node.send(fields)
        sent = Sent(
            load=under.number,
            number=caller.number,
            entry=caller.entry,
            due=caller.due,
            sent=began,
            ended=under.now,
            outcome=answer.outcome,
            counted=under.load.warm_up <= caller.due < under.load.end,
            alone=self._alone[caller.entry],
            accepted=self._accepted[caller.entry],
            status=answer.status,
            retry_after=answer.retry_after,
            detail=answer.detail,
            stages=answer.stages,
            first_step=None if answer.first_step is None else began + answer.first_step,
            fields=abridged(fields),
        )
        under.sent.append(sent)
        self._hear(sent)
        return answer

    async def _watch(self, under: _Under, tell: Tell) -> None:
        every = max(_EVERY, under.load.end / _SAMPLES)
        while True:
            at = under.now
            tell(at)
            if scrape := await self._node.scrape():
                under.samples.append(_sample(at, scrape))
            await asyncio.sleep(max(at + every - under.now, 0.01))


class _Under:
    """What is known of a load while it goes on."""

    def __init__(self, load: Load, number: int, began: float) -> None:
        self.load = load
        self.number = number
        self.sent: list[Sent] = []
        self.samples: list[Sample] = []
        self._began = began

    @property
    def now(self) -> float:
        """Seconds after the load began."""
        return time.perf_counter() - self._began


def _sample(at: float, scrape: Scrape) -> Sample:
    gauges = scrape.gauges
    return Sample(
        at=at,
        waiting=gauges.get("latentd_requests_waiting", 0.0),
        running=gauges.get("latentd_requests_running", 0.0),
        cpu=gauges.get("process_cpu_seconds_total"),
        memory=gauges.get("process_resident_memory_bytes"),
    )
