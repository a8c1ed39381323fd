"""The order of waiting requests: fair between callers, interactive before batch, short requests early; none starves."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from server.requests.request import Flow, Request


class _Waiting(NamedTuple):
    """The earliest due comes first, and of several the one that came first."""

    due: float
    number: int
    request: Request


@dataclass
class _WaitingFlow:
    """The waiting requests of a flow as a heap, and when its next one is served from, on the flows' clock."""

    start: float
    weight: float
    waiting: list[_Waiting] = field(default_factory=list)

    def next(self) -> _Waiting:
        """The request to serve next, and when the flow's share has paid for it."""
        return self._due(self.start, self.waiting[0])

    def all(self) -> Iterator[_Waiting]:
        """Every request, in order, and when the flow's share has paid for it."""
        start = self.start
        for entry in sorted(self.waiting):
            paid = self._due(start, entry)
            yield paid
            start = paid.due

    def _due(self, start: float, entry: _Waiting) -> _Waiting:
        return entry._replace(due=start + entry.request.work / self.weight)


class FairQueue:
    """Waiting requests in the order of weighted fair queueing (Demers, Keshav & Shenker, 1989), at two levels.

    A clock counts the work done for each of those who share the device. The request that would be done first, if all
    shared it by their weights, is served first: first among the flows, so that a caller who sends hundreds delays
    another by one request at a time, then among the requests of that flow. So a short request overtakes a long one,
    unless that has waited long enough to be done by now if it had shared the device; and an interactive request
    overtakes those of a batch, which keep their share.
    """

    def __init__(self) -> None:
        self._flows: dict[Flow, _WaitingFlow] = {}
        self._of_flows = self._of_requests = 0.0  # the clocks, in UNet rows times steps
        self._number = 0

    def __len__(self) -> int:
        return sum(len(flow.waiting) for flow in self._flows.values())

    def __iter__(self) -> Iterator[Request]:
        return (entry.request for flow in self._flows.values() for entry in flow.waiting)

    @property
    def flows(self) -> Iterable[Flow]:
        """Those that have requests here."""
        return self._flows.keys()

    def count(self, flow: Flow) -> int:
        """How many requests of `flow` wait."""
        return len(self._flows[flow].waiting) if flow in self._flows else 0

    def push(self, request: Request) -> None:
        flow = self._flows.setdefault(request.flow, self._new_flow(request.flow))
        heapq.heappush(flow.waiting, self._entry(request))
        self._number += 1

    def peek(self) -> Request:
        """The request to serve next. Raises ValueError where none waits."""
        return min(flow.next() for flow in self._flows.values()).request

    def heads(self) -> list[Request]:
        """The next request of each flow, in the order in which they are to be served."""
        return [entry.request for entry in sorted(flow.next() for flow in self._flows.values())]

    def pop(self, served: Request | None = None) -> Request:
        """Remove and return the request to serve next, or `served`, which is one of the `heads`.

        Raises ValueError where none waits.
        """
        flow = self._flows[(served or self.peek()).flow]
        flow.start = flow.next().due
        popped = heapq.heappop(flow.waiting).request
        self._forget_idle()
        return popped

    def before(self, request: Request) -> list[Request] | None:
        """The requests that are served before `request` if no others come; None where it does not wait."""
        requests = _in_order(self._flows.values())
        return requests[: requests.index(request)] if request in requests else None

    def ahead_of(self, newcomer: Request) -> list[Request]:
        """The requests that would be served before `newcomer` if it came now, and no others after it."""
        flow = self._flows.get(newcomer.flow) or self._new_flow(newcomer.flow)
        joined = replace(flow, waiting=[*flow.waiting, self._entry(newcomer)])
        requests = _in_order((self._flows | {newcomer.flow: joined}).values())
        return requests[: requests.index(newcomer)]

    def _new_flow(self, flow: Flow) -> _WaitingFlow:
        return _WaitingFlow(self._of_flows, flow.weight)

    def _entry(self, newcomer: Request) -> _Waiting:
        return _Waiting(self._of_requests + newcomer.work, self._number, newcomer)

    def advance(self, rows: int, running: Sequence[Request]) -> None:
        """Count a step of `rows`, while the requests `running` and those that wait share the device."""
        flows = {request.flow for request in running} | self._flows.keys()
        self._of_flows += rows / max(sum(flow.weight for flow in flows), 1)
        self._of_requests += rows / max(len(running) + len(self), 1)

    def discard(self, requests: Collection[Request]) -> None:
        """Remove those of `requests` that wait."""
        for flow in self._flows.values():
            flow.waiting = [entry for entry in flow.waiting if entry.request not in requests]
            heapq.heapify(flow.waiting)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Forget flows without waiting requests: one that comes back starts at the clock, without credit or debt."""
        self._flows = {name: flow for name, flow in self._flows.items() if flow.waiting}


def _in_order(flows: Iterable[_WaitingFlow]) -> list[Request]:
    return [entry.request for entry in sorted(entry for flow in flows for entry in flow.all())]
