"""Requests whose images are being decoded, and what becomes of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from engines.errors import DeviceLost
from server.requests.errors import BrokenPicture, ContentBlocked
from server.requests.request import Failed, Outcome
from server.runtime import failures
from server.runtime.pipeline.admission import PendingDecode

_log = logging.getLogger(__name__)


class PendingDecodes:
    """The requests whose last step is complete, in the order in which their images arrive. For the executor's thread.

    Their calls may have been launched long before, behind the step.
    """

    def __init__(self, collect: Callable[[PendingDecode], None]) -> None:
        """`collect` gives a request its outcome; it waits for the images if they are not here."""
        self._collect = collect
        self._pending: deque[PendingDecode] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def clear(self) -> None:
        self._pending.clear()

    def add(self, pending: PendingDecode) -> None:
        self._pending.append(pending)

    def collect_one(self, *, wait: bool) -> bool:
        """Collect the first, if its images are here, or after waiting for them; returns whether it was collected."""
        if not self._pending or not (wait or self._pending[0].done()):
            return False
        self._collect(self._pending[0])
        self._pending.popleft()  # not before: it counts until its request has an outcome
        return True

    def collect(self, *, wait: bool) -> None:
        """Collect all whose images are here. Wait for the first if asked to."""
        while self.collect_one(wait=wait):
            wait = False


def outcome_of(pending: PendingDecode) -> Outcome:
    """The images, or why there are none. Raises DeviceLost."""
    request = pending.request
    try:
        return pending.completed()
    except ContentBlocked as error:
        return Failed(error)
    except BrokenPicture as error:
        _log.error("request %s: %s", request.id, error, extra={"fields": {"request_id": request.id}})
        return Failed(error)
    except DeviceLost:
        raise
    except Exception as error:
        return failures.failed(error, request.id)
