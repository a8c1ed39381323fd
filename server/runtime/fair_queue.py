"""The order of waiting requests: fair between callers, short requests early, and none waits without end."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.requests.request import Request


class _Waiting(NamedTuple):
    """The earliest due comes first, and of several the one that came first."""

    due: float
    number: int
    request: Request


@dataclass
class _Caller:
    """The waiting requests of one caller as a heap, and when its next one is served from, on the callers' clock."""

    start: float
    waiting: list[_Waiting] = field(default_factory=list)

    def next(self) -> _Waiting:
        """The request to serve next, and when the caller's share has paid for it."""
        first = self.waiting[0]
        return first._replace(due=self.start + first.request.work)


class FairQueue:
    """Waiting requests in the order of weighted fair queueing (Demers, Keshav & Shenker, 1989), at two levels.

    A clock counts the work done for each of those who share the device. The request that would be done first, if all
    shared it equally, is served first: first among the callers, so that one who sends hundreds delays another by one
    request at a time, then among the requests of that caller. So a short request overtakes a long one, unless that has
    waited long enough to be done by now if it had shared the device.
    """

    def __init__(self) -> None:
        self._callers: dict[str, _Caller] = {}
        self._of_callers = self._of_requests = 0.0  # the clocks, in UNet rows times steps
        self._number = 0

    def __len__(self) -> int:
        return sum(len(caller.waiting) for caller in self._callers.values())

    def __iter__(self) -> Iterator[Request]:
        return (entry.request for caller in self._callers.values() for entry in caller.waiting)

    def count(self, caller: str) -> int:
        """How many requests of `caller` wait."""
        return len(self._callers[caller].waiting) if caller in self._callers else 0

    def push(self, request: Request) -> None:
        caller = self._callers.setdefault(request.caller, _Caller(self._of_callers))
        self._number += 1
        heapq.heappush(caller.waiting, _Waiting(self._of_requests + request.work, self._number, request))

    def peek(self) -> Request:
        """The request that `pop` returns next. Raises ValueError where none waits."""
        return self._next().request

    def pop(self) -> Request:
        """Remove and return the request to serve next. Raises ValueError where none waits."""
        served = self._next()
        caller = self._callers[served.request.caller]
        heapq.heappop(caller.waiting)
        caller.start = served.due
        self._forget_idle()
        return served.request

    def advance(self, rows: int, running: Sequence[Request]) -> None:
        """Count a step of `rows`, while the requests `running` and those that wait share the device."""
        callers = {request.caller for request in running} | self._callers.keys()
        self._of_callers += rows / max(len(callers), 1)
        self._of_requests += rows / max(len(running) + len(self), 1)

    def discard(self, requests: Collection[Request]) -> None:
        """Remove those of `requests` that wait."""
        for caller in self._callers.values():
            caller.waiting = [entry for entry in caller.waiting if entry.request not in requests]
            heapq.heapify(caller.waiting)
        self._forget_idle()

    def _next(self) -> _Waiting:
        return min(caller.next() for caller in self._callers.values())

    def _forget_idle(self) -> None:
        """Forget callers without waiting requests: one who comes back starts at the clock, without credit or debt."""
        self._callers = {name: caller for name, caller in self._callers.items() if caller.waiting}
