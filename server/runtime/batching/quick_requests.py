"""How long steps may take, so that quick requests do not wait for those of others. Policy only: no device, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from server.requests.request import Request

_REMEMBERED = 1000  # steps after a quick request for which another one is expected
_ALIKE = 1.5  # times the seconds of the quickest: requests that are about as quick
_EFFICIENT = 0.75, 0.95  # of the rows per second of a full step: what steps with quick requests, and others, compute


class StepLimits(NamedTuple):
    """The most rows of a step."""

    with_quick: int  # where quick requests wait for it, or take part
    without: int  # where another quick request may come while the device computes it


class QuickRequests:
    """The requests that take the least time alone, and which steps are short enough for them.

    A quick request waits for the step that the device computes, takes its own together with others, and is encoded and
    decoded. If no step takes longer than the quickest request does alone, that one takes three times as long at most.
    """

    def __init__(self) -> None:
        self._quickest = math.inf  # seconds from the prompt to the image
        self._steps = 0  # since such a request came
        self._alone: WeakKeyDictionary[Request, float] = WeakKeyDictionary()  # seconds

    @property
    def expected(self) -> bool:
        """Whether quick requests came lately."""
        return self._quickest < math.inf

    def came(self, request: Request, seconds: float) -> None:
        """`request` came, which takes so long alone; 0 if that is unknown."""
        if seconds:
            self._alone[request] = seconds
        if 0 < seconds <= self._quickest * _ALIKE:
            self._quickest, self._steps = seconds, 0

    def stepped(self) -> None:
        """A step is taken."""
        self._steps += 1
        if self._steps > _REMEMBERED:
            self._quickest = math.inf

    def among(self, requests: Iterable[Request]) -> frozenset[Request]:
        """Those of `requests` that are about as quick as the quickest."""
        most = self._quickest * _ALIKE
        return frozenset([one for one in requests if self._alone.get(one, math.inf) <= most])

    def limits(self, seconds: Callable[[int], float], *, max_rows: int) -> StepLimits:
        """The most rows that steps have, where other requests are not as quick.

        Where a short step computes much fewer rows per second than a full one, as on a GPU, steps stay nearly full.

        Args:
            seconds: what a step of so many rows takes; 0 if unknown.
            max_rows: of a full step.
        """
        full = seconds(max_rows)
        if full <= self._quickest:
            return StepLimits(max_rows, max_rows)
        rates = {rows: rows / seconds(rows) for rows in range(1, max_rows + 1)}
        brief = max((rows for rows, rate in rates.items() if rows <= rate * self._quickest), default=1)
        # Not bisected: where steps are padded, a row more may halve the rate.
        efficient = (next(rows for rows in rates if rates[rows] >= least * rates[max_rows]) for least in _EFFICIENT)
        return StepLimits(*(max(brief, rows) for rows in efficient))
