"""A server that takes only as many steps as a file says, and as many as there are while there is no such file.

LATENTD_STEPS=path python -m tests.support.held_server [the server's arguments]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from server.__main__ import main
from server.requests.request import Request
from server.runtime.batching.batcher import Batch, Batcher
from server.runtime.batching.model_lines import ModelLines

VARIABLE = "LATENTD_STEPS"
_PAUSE = 0.002  # seconds between turns in which nothing happens

Turn = tuple[tuple[Request, ...], tuple[Request, ...]]


class Gate:
    """Lets steps pass, as many as the file says: it holds the number of the hold, and of the steps in it."""

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

    def count(self, turn: Turn) -> Turn:
        """`turn`, which has passed."""
        self._taken += bool(turn[1])
        return turn


def hold(gate: Gate) -> None:
    """Let nobody join or take a step while the gate is closed. What is launched completes, and who leaves is gone."""
    take_turn, next_batch = ModelLines.take_turn, Batcher.next_batch

    def take_turn_at_the_gate(lines: ModelLines) -> Turn:
        return gate.count(take_turn(lines)) if gate.is_open() else ((), ())

    def next_batch_unhurried(batcher: Batcher, *, timeout: float | None = None) -> Batch | None:
        batch = next_batch(batcher, timeout=timeout)
        if not any(batch or ()) and not gate.is_open():
            time.sleep(_PAUSE)
        return batch

    ModelLines.take_turn = take_turn_at_the_gate  # type: ignore[assignment, method-assign]
    Batcher.next_batch = next_batch_unhurried  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    hold(Gate(Path(os.environ[VARIABLE])))
    sys.exit(main())
