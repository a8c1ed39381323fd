"""What came of each request, and what follows from all of them. Pure; these are also the files' contents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from loadtest.mix import Entry
from loadtest.provenance import Fact, Run
from loadtest.statistics import goodput, percentile

Outcome = Literal["completed", "refused", "not ready", "failed", "client timeout"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "refused", "not ready", "failed", "client timeout")
STAGES = ("queue", "encode", "denoise", "decode", "image")  # as the server times them
REST = "network, client"  # of a latency, what is in none of them

_ON_TIME = 0.02  # seconds that a client may be late without being blamed,
_ON_TIME_SHARE = 0.05  # or as a share of the median latency


class Load(Fact):
    """One load: callers by chance at `rate` per second, or `users` who each wait for their picture."""

    rate: float | None = None
    users: int | None = None
    warm_up: float = Field(description="seconds at its beginning whose requests are not counted")
    seconds: float = Field(description="that count")

    @property
    def end(self) -> float:
        return self.warm_up + self.seconds

    @property
    def label(self) -> str:
        return f"{self.rate:.4g}/s" if self.rate is not None else f"{self.users} users"


class Sent(Fact):
    """One request and its one ending. Times are seconds after the load began."""

    load: int
    number: int
    entry: int
    due: float
    sent: float
    ended: float
    outcome: Outcome
    counted: bool = Field(description="due after the warm-up")
    alone: float = Field(description="seconds that such a request takes on an idle server")
    accepted: float = Field(description="seconds within which it counts as good")
    status: int | None = None
    retry_after: float | None = None
    detail: str = ""
    stages: dict[str, float] | None = Field(default=None, description="seconds, by the server")
    first_step: float | None = Field(default=None, description="when the first step was told of, where they are")
    fields: dict[str, Any]

    @property
    def latency(self) -> float:
        """From when it was due: a late client cannot hide a slow server."""
        return self.ended - self.due

    @property
    def late(self) -> float:
        return self.sent - self.due

    @property
    def to_first_step(self) -> float | None:
        """From when it was due, as latency is."""
        return None if self.first_step is None else self.first_step - self.due

    @property
    def rest(self) -> float:
        """Of its latency, what the server did not see: the network, and the client's own lateness."""
        spent = sum((self.stages or {}).get(stage, 0.0) for stage in STAGES)
        return max(self.latency - spent, 0.0)


class Sample(Fact):
    """What /metrics said at a moment."""

    at: float
    waiting: float
    running: float
    cpu: float | None = Field(default=None, description="seconds of the server's process so far, if it tells")
    memory: float | None = Field(default=None, description="bytes, resident")


class Percentiles(Fact):
    """Seconds."""

    p50: float
    p90: float
    p95: float
    p99: float
    most: float


class Point(Fact):
    """What a load came to."""

    number: int = Field(description="of the load, as its requests bear it")
    load: Load
    requests: int = Field(description="counted ones")
    offered: float = Field(description="counted requests per second")
    throughput: float = Field(description="completed per second, by when they ended")
    goodput: float = Field(description="counted requests per second that were completed within what is accepted")
    outcomes: dict[Outcome, int]
    latency: Percentiles | None = Field(description="of the completed, from when they were due; None without any")
    first_step: Percentiles | None = Field(default=None, description="until then, where steps were told of")
    slowdown: float | None = Field(description="99th percentile of latency over that of an idle server")
    late: Percentiles | None = Field(description="the client's own lateness")
    kept_up: bool = Field(description="the client was on time")
    step_rows: dict[int, int] = Field(description="steps by UNet rows")
    samples: tuple[Sample, ...]

    @property
    def other_failures(self) -> int:
        """Requests that ended neither completed nor refused."""
        return self.requests - self.outcomes["completed"] - self.outcomes["refused"]


class Compared(Fact):
    """A figure beside that of an earlier run."""

    load: str
    figure: str
    before: float
    after: float
    ratio: float = Field(description="after / before")
    low: float = Field(description="of the ratio's interval")
    high: float
    regressed: bool


class Summary(Fact):
    """summary.json."""

    format: Literal[1] = 1
    run: Run = Field(description="of the client: its command, machine and packages")
    url: str
    face: str = Field(default="json", description="how pictures were asked for")
    server_version: str | None
    models: list[dict[str, Any]]
    seed: int
    slo: float = Field(description="seconds; where it follows from idle latencies, the mix's mean")
    slo_given: bool
    entries: tuple[Entry, ...]
    alone: tuple[float, ...] = Field(description="seconds of each entry on an idle server")
    points: tuple[Point, ...]
    knee: float | None = Field(description="the highest rate that held, callers per second")
    notes: tuple[str, ...]
    baseline: str | None = None
    compared: tuple[Compared, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """A load and all that was sent under it."""

    point: Point
    requests: tuple[Sent, ...]


def outcome_of(status: int, *, whole: bool = True) -> Outcome:
    """How a request ended that was answered with `status`; `whole` where the answer holds pictures and timings."""
    match status:
        case 200 if whole:
            return "completed"
        case 429:
            return "refused"
        case 503:
            return "not ready"
        case _:
            return "failed"


def percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    p50, p90, p95, p99 = (percentile(values, q) for q in (50, 90, 95, 99))
    return Percentiles(p50=p50, p90=p90, p95=p95, p99=p99, most=max(values))


def sum_up(
    load: Load, number: int, sent: Sequence[Sent], *, samples: Sequence[Sample] = (), step_rows: Mapping[int, int]
) -> Point:
    """The figures of a load. Requests of the warm-up count for nothing but what ended after it."""
    counted = [one for one in sent if one.counted]
    done = [one for one in counted if one.outcome == "completed"]
    ended = [one for one in sent if one.outcome == "completed" and load.warm_up <= one.ended < load.end]
    latency, late = percentiles([one.latency for one in done]), percentiles([one.late for one in counted])
    tally = Counter(one.outcome for one in counted)
    return Point(
        number=number,
        load=load,
        requests=len(counted),
        offered=len(counted) / load.seconds,
        throughput=len(ended) / load.seconds,
        goodput=goodput([one.latency for one in done], [one.accepted for one in done], seconds=load.seconds),
        outcomes={outcome: tally[outcome] for outcome in OUTCOMES},
        latency=latency,
        first_step=percentiles([one.to_first_step for one in done if one.to_first_step is not None]),
        slowdown=percentile([one.latency / one.alone for one in done], 99) if done else None,
        late=late,
        kept_up=late is None or late.p99 <= max(_ON_TIME, _ON_TIME_SHARE * (latency.p50 if latency else 0.0)),
        step_rows=dict(step_rows),
        samples=tuple(samples),
    )


def rows_between(before: Mapping[float, float], after: Mapping[float, float]) -> dict[int, int]:
    """Steps by rows, from two readings of a cumulative histogram: counts by upper bound."""
    bounds = sorted(bound for bound in after if math.isfinite(bound))
    grown = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    return {int(bound): int(this - last) for bound, this, last in zip(bounds, grown, [0.0, *grown[:-1]], strict=True)}
