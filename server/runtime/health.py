"""Whether images succeed: judged by the outcomes of the last requests."""

from __future__ import annotations

from server.requests.errors import BrokenPicture, StepFailed
from server.requests.request import Completed, Outcome

_MOST_FAULTS = 8  # in a row: fewer may be the fault of one caller's parameters


class Health:
    """Counts faults of the model or the device since the last image. For one thread; any may read `reason`."""

    def __init__(self) -> None:
        self._faults = 0
        self.reason = ""  # why nothing succeeds; empty while images do

    def observe(self, outcome: Outcome) -> None:
        """Count an outcome. Cancelled requests say nothing."""
        if isinstance(outcome, Completed):
            self._faults, self.reason = 0, ""
        elif isinstance(outcome.error, BrokenPicture | StepFailed):
            self._faults += 1
            if self._faults >= _MOST_FAULTS:
                self.reason = f"the last {self._faults} requests failed, of which the last said: {outcome.error}"
