"""The records of requests, the metrics derived from them, and the summary of a run. Pure; also the files' contents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from loadtest.analysis.statistics import goodput, percentile
from loadtest.mix import MixEntry
from loadtest.provenance import ResultModel, Run

Outcome = Literal["completed", "refused", "not ready", "failed", "client timeout"]
OUTCOMES: tuple[Outcome, ...] = ("completed", "refused", "not ready", "failed", "client timeout")
STAGES = ("queue", "encode", "denoise", "decode", "image")  # the server's own timings
REST = "network, client"  # the part of a latency that is in none of the stages

_ON_TIME = 0.02  # seconds that the client may send late before it counts as too slow,
_ON_TIME_SHARE = 0.05  # or as a share of the median latency


class LoadLevel(ResultModel):
    """One load: Poisson arrivals at `rate` requests per second, or `users` who each wait for their image."""

    rate: float | None = None
    users: int | None = None
    warm_up: float = Field(description="seconds at the beginning whose requests are not counted")
    seconds: float = Field(description="duration that is counted, after the warm-up")

    @property
    def end(self) -> float:
        return self.warm_up + self.seconds

    @property
    def label(self) -> str:
        return f"{self.rate:.4g}/s" if self.rate is not None else f"{self.users} users"


class RequestRecord(ResultModel):
    """One request and its outcome, a line of requests.jsonl. Times are seconds after the load began."""

    load: int = Field(description="number of the load")
    number: int = Field(description="number of the request within the load")
    entry: int = Field(description="index of its entry in the mix")
    due: float
    sent: float
    ended: float
    outcome: Outcome
    counted: bool = Field(description="due after the warm-up")
    idle_latency: float = Field(description="seconds that such a request takes on an idle server")
    latency_target: float = Field(description="seconds within which it counts towards goodput")
    status: int | None = None
    retry_after: float | None = None
    detail: str = ""
    stages: dict[str, float] | None = Field(default=None, description="the server's timings, seconds")
    first_step: float | None = Field(default=None, description="when the first step's event arrived, if streamed")
    fields: dict[str, Any]

    @property
    def latency(self) -> float:
        """Seconds since it was due, so that a late client cannot hide a slow server."""
        return self.ended - self.due

    @property
    def late(self) -> float:
        """Seconds between when it was due and when it was sent."""
        return self.sent - self.due

    @property
    def to_first_step(self) -> float | None:
        """Seconds from when it was due to its first step."""
        return None if self.first_step is None else self.first_step - self.due

    @property
    def rest(self) -> float:
        """The part of the latency outside the server's stages: network and client lateness, seconds."""
        spent = sum((self.stages or {}).get(stage, 0.0) for stage in STAGES)
        return max(self.latency - spent, 0.0)


class MetricsSample(ResultModel):
    """The server's /metrics at one moment."""

    at: float = Field(description="seconds after the load began")
    waiting: float
    running: float
    cpu: float | None = Field(default=None, description="CPU seconds of the server's process so far, if exported")
    memory: float | None = Field(default=None, description="resident bytes of the server's process, if exported")


class Percentiles(ResultModel):
    """Percentiles and maximum, seconds."""

    p50: float
    p90: float
    p95: float
    p99: float
    most: float


class LoadMetrics(ResultModel):
    """The metrics of one load."""

    number: int = Field(description="number of the load, as in its request records")
    load: LoadLevel
    requests: int = Field(description="counted requests")
    offered: float = Field(description="counted requests per second")
    throughput: float = Field(description="counted requests completed per second of the time in which they were served")
    goodput: float = Field(description="counted requests per second that completed within their latency target")
    outcomes: dict[Outcome, int]
    latency: Percentiles | None = Field(description="of completed requests, since they were due; None without any")
    first_step: Percentiles | None = Field(default=None, description="time to the first step, where it is streamed")
    slowdown: float | None = Field(description="99th percentile of latency over that of an idle server")
    late: Percentiles | None = Field(description="the client's own lateness")
    kept_up: bool = Field(description="the client sent requests on time")
    step_rows: dict[int, int] = Field(description="steps by number of UNet rows")
    samples: tuple[MetricsSample, ...]
    lost: float | None = Field(default=None, description="seconds into the load at which the server was found dead")

    @property
    def other_failures(self) -> int:
        """Requests that neither completed nor were refused."""
        return self.requests - self.outcomes["completed"] - self.outcomes["refused"]


class ComparedMetric(ResultModel):
    """A metric of one load compared with an earlier run."""

    load: str
    figure: str
    before: float
    after: float
    ratio: float = Field(description="after / before")
    low: float = Field(description="lower bound of the ratio's interval")
    high: float = Field(description="upper bound of the ratio's interval")
    regressed: bool

    @property
    def ratio_text(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


class LoadTestSummary(ResultModel):
    """A whole run: the contents of summary.json."""

    format: Literal[1] = 1
    run: Run = Field(description="the client's command, machine and packages")
    url: str
    servers: tuple[str, ...] = Field(
        default=(), description="servers behind the balancer at `url`, where they were named"
    )
    response_format: str = Field(default="json", description="how images were requested")
    server_version: str | None
    models: list[dict[str, Any]]
    seed: int
    slo: float = Field(description="latency target, seconds; the mix's mean where it follows from idle latencies")
    slo_given: bool
    entries: tuple[MixEntry, ...]
    idle_latencies: tuple[float, ...] = Field(description="seconds of each entry on an idle server")
    points: tuple[LoadMetrics, ...]
    knee: float | None = Field(description="the highest rate that the server sustained, requests per second")
    notes: tuple[str, ...]
    baseline: str | None = None
    compared: tuple[ComparedMetric, ...] = ()


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """A load's metrics and its request records."""

    point: LoadMetrics
    requests: tuple[RequestRecord, ...]


def outcome_of(status: int, *, whole: bool = True) -> Outcome:
    """Return the outcome of a response; `whole` is whether its body holds images and timings."""
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
    """Return the percentiles of `values`, seconds; None without any."""
    if not values:
        return None
    p50, p90, p95, p99 = (percentile(values, q) for q in (50, 90, 95, 99))
    return Percentiles(p50=p50, p90=p90, p95=p95, p99=p99, most=max(values))


def summarize(
    load: LoadLevel,
    number: int,
    requests: Sequence[RequestRecord],
    *,
    samples: Sequence[MetricsSample] = (),
    step_rows: Mapping[int, int],
    lost: float | None = None,
) -> LoadMetrics:
    """Return the metrics of a load. Requests of the warm-up are not counted."""
    counted = [one for one in requests if one.counted]
    done = [one for one in counted if one.outcome == "completed"]
    latency, late = percentiles([one.latency for one in done]), percentiles([one.late for one in counted])
    tally = Counter(one.outcome for one in counted)
    return LoadMetrics(
        number=number,
        load=load,
        requests=len(counted),
        offered=len(counted) / load.seconds,
        throughput=len(done) / service_window(load, requests)[1],
        goodput=goodput([one.latency for one in done], [one.latency_target for one in done], seconds=load.seconds),
        outcomes={outcome: tally[outcome] for outcome in OUTCOMES},
        latency=latency,
        first_step=percentiles([one.to_first_step for one in done if one.to_first_step is not None]),
        slowdown=percentile([one.latency / one.idle_latency for one in done], 99) if done else None,
        late=late,
        kept_up=late is None or late.p99 <= max(_ON_TIME, _ON_TIME_SHARE * (latency.p50 if latency else 0.0)),
        step_rows=dict(step_rows),
        samples=tuple(samples),
        lost=lost,
    )


def service_window(load: LoadLevel, requests: Sequence[RequestRecord]) -> tuple[float, float]:
    """Return when the server began with the counted requests, and how many seconds it took for all that completed.

    It begins when the warm-up's last request has ended, and lasts at least as long as requests were counted. So a queue
    left by the warm-up does not lift throughput above the offered load, and one left at the end does not hide overload.
    """
    ends = {
        counted: [one.ended for one in requests if one.outcome == "completed" and one.counted == counted]
        for counted in (False, True)
    }
    began = max([load.warm_up, *ends[False]])
    return began, max([load.seconds, *(ended - began for ended in ends[True])])


def rows_between(before: Mapping[float, float], after: Mapping[float, float]) -> dict[int, int]:
    """Return steps by rows, from two readings of a cumulative histogram (counts by upper bound)."""
    bounds = sorted(bound for bound in after if math.isfinite(bound))
    grown = [after[bound] - before.get(bound, 0.0) for bound in bounds]
    return {int(bound): int(this - last) for bound, this, last in zip(bounds, grown, [0.0, *grown[:-1]], strict=True)}
