"""Request-level batching, for comparison: newcomers wait until every running request is done."""

from __future__ import annotations

from collections.abc import Iterator

from server.requests.request import Request
from server.runtime.batching.line import Line


class RequestLevelLine(Line):
    """Admits newcomers only when none runs. A request with fewer steps still leaves early, as in continuous batching.

    That favours it: where a batch is one pipeline call, all wait for the longest, and share its scheduler.
    """

    def join(self, max_rows: int) -> Iterator[Request]:
        if not self.running:
            yield from super().join(max_rows)


class SwitchablePolicy:
    """Makes lines that batch by step, or by request while `by_request` is set: change it while no request is open.

    One executor serves both, so that engines, memory and warm-up are the same.
    """

    by_request = False

    def __call__(self) -> Line:
        return RequestLevelLine() if self.by_request else Line()
