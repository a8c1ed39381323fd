"""A server that takes only as many steps as a file says, and as many as there are while there is no such file.

LATENTD_STEPS=path python -m tests.support.held_server [the server's arguments]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from server.__main__ import main
from server.runtime.batching.batcher import Batch, Batcher

VARIABLE = "LATENTD_STEPS"
_NONE = Batch((), (), ())


class Gate:
    """Lets batches pass, as many as the file says: it holds the number of the hold, and of the steps in it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._hold = ""
        self._taken = 0  # since this hold began

    def is_open(self) -> bool:
        try:
            hold, _, steps = self._file.read_text().partition(" ")
        except FileNotFoundError:
            return True
        if hold != self._hold:
            self._hold, self._taken = hold, 0
        return self._taken < int(steps or 0)  # none while it is being written

    def count(self, batch: Batch | None) -> Batch | None:
        """`batch`, which has passed."""
        self._taken += bool(batch and batch.requests)
        return batch


def hold(gate: Gate) -> None:
    """Give the executor no batch while the gate is closed. What it has launched completes."""
    next_batch = Batcher.next_batch

    def next_batch_at_the_gate(batcher: Batcher, *, timeout: float | None = None) -> Batch | None:
        if gate.is_open():
            return gate.count(next_batch(batcher, timeout=timeout))
        time.sleep(0.002)
        return _NONE

    Batcher.next_batch = next_batch_at_the_gate  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    hold(Gate(Path(os.environ[VARIABLE])))
    sys.exit(main())
