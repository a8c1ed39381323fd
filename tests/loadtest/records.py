"""Request records and load metrics for tests."""

from __future__ import annotations

from typing import Any

from loadtest.analysis.results import OUTCOMES, LoadLevel, LoadMetrics, Outcome, RequestRecord

UNREACHABLE = "http://127.0.0.1:9"  # the discard port, which refuses connections


def request_record(
    due: float, latency: float, *, late: float = 0.0, outcome: Outcome = "completed", **more: Any
) -> RequestRecord:
    default = {
        "load": 0,
        "number": 0,
        "entry": 0,
        "counted": True,
        "idle_latency": 0.1,
        "latency_target": 0.4,
        "fields": {},
    }
    return RequestRecord(due=due, sent=due + late, ended=due + latency, outcome=outcome, **{**default, **more})


def load_metrics(rate: float, *, goodput: float, slowdown: float | None = 2.0) -> LoadMetrics:
    tally: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
    return LoadMetrics(
        number=0,
        load=LoadLevel(rate=rate, warm_up=0, seconds=10),
        requests=int(rate * 10),
        offered=rate,
        throughput=goodput,
        goodput=goodput,
        outcomes=tally,
        latency=None,
        slowdown=slowdown,
        late=None,
        kept_up=True,
        step_rows={},
        samples=(),
    )
