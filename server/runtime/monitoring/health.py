"""Whether images succeed: judged by the outcomes of the last requests, and by test images while those fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from server.requests.errors import BrokenPicture, ContentBlocked, ServerError, StepFailed
from server.requests.request import Completed, Outcome

_MOST_FAULTS = 8  # in a row: fewer may be the fault of one caller's parameters


class Health:
    """Counts faults of the model or the device since the last image. For one thread; any may read `reason`."""

    test_every = 5.0  # seconds between test images, while nothing succeeds

    def __init__(self, submit_test: Callable[[], object]) -> None:
        """`submit_test` queues a request for a test image, or raises ServerError."""
        self._submit_test = submit_test
        self._next_test = 0.0
        self._faults = 0
        self.reason = ""  # why nothing succeeds; empty while images do

    def observe(self, outcome: Outcome) -> None:
        """Count an outcome. Cancelled requests say nothing."""
        if isinstance(outcome, Completed) or isinstance(outcome.error, ContentBlocked):
            self._faults, self.reason = 0, ""
        elif isinstance(outcome.error, BrokenPicture | StepFailed):
            self._faults += 1
            if self._faults >= _MOST_FAULTS:
                self.reason = f"the last {self._faults} requests failed, of which the last said: {outcome.error}"

    def test(self) -> None:
        """Have a test image drawn if one is due: the first that succeeds ends the reason."""
        if not self.reason or time.monotonic() < self._next_test:
            return
        self._next_test = time.monotonic() + self.test_every
        with suppress(ServerError):  # the queue is full of requests that tell as much
            self._submit_test()
