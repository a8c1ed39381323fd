"""Which requests take the next step, where they cannot all take it: equal shares for callers."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from server.requests.request import Flow, Request

_SLACK = 1.05  # what measured step times may exceed a limit by


class FairSteps:
    """Start-time fair queueing (Goyal, Vin & Cheng, 1996) of the flows that run, in UNet rows.

    The flow with the least service, relative to its weight, goes first; its requests take turns.
    """

    def __init__(self) -> None:
        self._served: dict[Flow, float] = {}  # in UNet rows by weight

    def choose(self, running: Sequence[Request], *, max_rows: int, fair_rows: int) -> tuple[Request, ...]:
        """The requests of one step, of one depth and at most `max_rows`.

        `running` has the one that waited longest first. Beyond the first chosen, they are at most `fair_rows`.
        """
        requests: dict[Flow, deque[Request]] = defaultdict(deque)
        for one in running:
            requests[one.flow].append(one)
        least = min((self._served.get(flow, 0.0) for flow in requests if flow in self._served), default=0.0)
        served = {flow: max(self._served.get(flow, least), least) for flow in requests}
        order = [(served[flow], place, flow) for place, flow in enumerate(requests)]
        heapq.heapify(order)
        turn: list[Request] = []
        free = max_rows
        while order:
            _, place, flow = heapq.heappop(order)
            one = requests[flow].popleft()
            if not turn or (_share_a_step(turn[0], one) and one.rows <= free):
                free = (free if turn else max(fair_rows, one.rows)) - one.rows
                turn.append(one)
                served[flow] += one.rows / flow.weight
            if requests[flow]:
                heapq.heappush(order, (served[flow], place, flow))
        self._served = served
        return tuple(turn)

    def forget(self) -> None:
        """All take every step: who had more of the steps before owes nothing."""
        self._served = {}


def _share_a_step(first: Request, other: Request) -> bool:
    return first.depth == other.depth and not first.params.isolated and not other.params.isolated


def fair_rows(
    line: Mapping[Flow, int], lines: Iterable[Mapping[Flow, float]], seconds: Callable[[int], float], *, max_rows: int
) -> int:
    """The most rows of a step such that no flow's steps take longer than if it had its share of the device alone.

    Where a step of many rows takes hardly longer than one of few, as on a GPU, that is all of them.

    Args:
        line: the rows of each flow that runs at the size of the step.
        lines: for each size, the seconds that a step of each flow's rows alone takes.
        seconds: what a step of so many rows takes at this size; 0 if unknown.
    """
    share = sum(flow.weight for flow in line) / max(flow.weight for flow in line)
    limit = share * min(alone / flow.weight for flows in lines for flow, alone in flows.items()) * _SLACK
    return next((rows for rows in range(max_rows, 0, -1) if seconds(rows) <= limit), 1)
