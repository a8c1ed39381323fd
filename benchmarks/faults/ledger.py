"""The ledger: every accepted request has one outcome, its caller heard it, and nothing that it used was kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults.callers import Tally

_IN_FLIGHT = ("latentd_requests_waiting", "latentd_requests_running", "latentd_requests_decoding")
_POLL = 0.05  # seconds
_MEBI = 2**20


@dataclass(frozen=True, slots=True)
class Ledger:
    """The server's own account, from /metrics."""

    outcomes: Mapping[str, int] = field(default_factory=dict)  # accepted requests that have ended
    rejected: int = 0
    in_flight: int = 0

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse a Prometheus exposition."""
        outcomes: dict[str, int] = {}
        rejected = in_flight = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "latentd_requests_total":
                    outcome = sample.labels["outcome"]
                    outcomes[outcome] = outcomes.get(outcome, 0) + int(sample.value)
                elif sample.name == "latentd_requests_rejected_total":
                    rejected += int(sample.value)
                elif sample.name in _IN_FLIGHT:
                    in_flight += int(sample.value)
        return cls(outcomes, rejected, in_flight)

    @property
    def ended(self) -> int:
        return sum(self.outcomes.values())

    @property
    def cancelled(self) -> int:
        """Requests given up by their caller, their time limit or a stop."""
        return self.ended - self.outcomes.get("completed", 0) - self.outcomes.get("failed", 0)

    def since(self, before: Ledger) -> Ledger:
        """What happened after `before`."""
        outcomes = {name: count - before.outcomes.get(name, 0) for name, count in self.outcomes.items()}
        return Ledger(outcomes, self.rejected - before.rejected, self.in_flight)

    def faults(self, tally: Tally) -> Iterator[str]:
        """Yield each way in which this account and that of all the server's callers disagree.

        Callers who left know of no outcome: theirs may be any, or none if they left before they were accepted.
        """
        seen = tally.endings
        left, done = seen["left"], self.outcomes.get("completed", 0)
        failed, told = self.outcomes.get("failed", 0), seen["unavailable"] + seen["cancelled"]
        if tally.sent != len(tally.answers):
            yield f"{tally.sent} requests were sent, and {len(tally.answers)} were answered"
        if self.in_flight:
            yield f"{self.in_flight} requests are still in flight"
        if lost := seen["disconnected"]:
            yield f"{lost} requests were disconnected without an answer"
        if not seen["completed"] <= done <= seen["completed"] + left:
            yield f"{done} requests completed, callers saw {seen['completed']}, and {left} left"
        if not seen["failed"] <= failed <= seen["failed"] + left:
            yield f"{failed} requests failed, callers saw {seen['failed']}, and {left} left"
        if self.cancelled > left + told:
            yield f"{self.cancelled} requests were cancelled, but {left} callers left and {told} were told to try later"
        if not left and not told and self.ended != seen["completed"] + seen["failed"]:
            yield f"{self.ended} accepted requests ended, callers saw {seen['completed'] + seen['failed']}"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds."""

    memory: int  # bytes, the proportional set size
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """Read them from the system. Raises psutil.Error where the process has ended."""
        process = psutil.Process(pid)
        return cls(process.memory_full_info().pss, process.num_fds(), process.num_threads())

    def growth(self, before: Resources, *, memory: int, threads: int = 4) -> Iterator[str]:
        """Yield what has grown since `before` by more than some bytes, threads, or at all for descriptors."""
        if self.memory - before.memory > memory:
            yield f"memory grew from {before.memory / _MEBI:.0f} to {self.memory / _MEBI:.0f} MiB"
        if self.descriptors > before.descriptors:
            yield f"descriptors grew from {before.descriptors} to {self.descriptors}"
        if self.threads > before.threads + threads:
            yield f"threads grew from {before.threads} to {self.threads}"


def settle(url: str, pid: int, before: Resources, *, seconds: float) -> tuple[Ledger, Resources]:
    """Wait until nothing is in flight and the descriptors of `before` are back; at most so many seconds.

    Returns the state then. Connections are closed a moment after their callers have gone, and cancelled requests end
    with the step that they are in.
    """
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=30, trust_env=False, headers={"Connection": "close"}) as client:
        while True:
            ledger = Ledger.read(client.get("/metrics").text)
            held = Resources.of(pid)
            if (not ledger.in_flight and held.descriptors <= before.descriptors) or time.monotonic() > deadline:
                return ledger, held
            time.sleep(_POLL)
