"""Request-level batching, to compare with: newcomers wait until everybody who runs is done."""

from __future__ import annotations

from collections.abc import Iterator

from server.requests.request import Request
from server.runtime.batcher import Batcher, _Line


class _Shift(_Line):
    """Lets newcomers in only when nobody runs. Whoever needs fewer steps still leaves early, as in continuous batching.

    That is kind to it: where a batch is one call of a pipeline, all wait for the longest, and share its scheduler.
    """

    def join(self, max_rows: int) -> Iterator[Request]:
        if not self.running:
            yield from super().join(max_rows)


class SwitchingBatcher(Batcher):
    """Batches by step, or by request while `by_request` is set: change it when nobody waits or runs.

    One executor serves both, so that engines, memory and warm-up are the same.
    """

    by_request = False

    def submit(self, request: Request) -> int:
        if self.by_request:
            with self._changed:
                self._lines.setdefault(request.params.size, _Shift())
        return super().submit(request)
