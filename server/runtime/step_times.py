"""How long steps take, by picture size, depth and rows: measured when warming up, and kept true by every step since."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from engines.manifest import Size
from server.requests.request import Depth, Request

Kind = tuple[Size, Depth]  # of steps

_WEIGHT = 0.1  # of a new measurement beside those before it


class StepTimeModel:
    """The curve from rows to seconds of each kind of step. For any thread."""

    def __init__(self, *, max_rows: int) -> None:
        self._max_rows = max_rows
        self._seconds: dict[Kind, dict[int, float]] = {}
        self._ends: dict[Size, float] = {}
        self._lock = threading.Lock()

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """A step of `rows` took `seconds`."""
        with self._lock:
            known = self._seconds.setdefault(kind, {})
            known[rows] = known.get(rows, seconds) * (1 - _WEIGHT) + seconds * _WEIGHT

    def seconds(self, kind: Kind, rows: int) -> float:
        """What a step of `rows` takes: between measured points on a line, beyond them in proportion; 0 if unknown."""
        with self._lock:
            return _seconds(self._seconds.get(kind, {}), rows)

    def cheapest(self, kind: Kind, row_counts: Sequence[int]) -> int:
        """The row count whose step takes the least time: kernels of a larger one are sometimes the faster."""
        with self._lock:
            known = self._seconds.get(kind, {})
            return min(row_counts, key=lambda rows: _seconds(known, rows))

    def observe_ends(self, size: Size, seconds: float) -> None:
        """Encoding what a request of one picture brings, and decoding what it leaves, took `seconds`."""
        with self._lock:
            self._ends[size] = seconds

    def ends(self, size: Size) -> float:
        """What encoding and decoding take together; 0 if unknown."""
        with self._lock:
            return self._ends.get(size, 0.0)

    def work(self, request: Request) -> float:
        """Seconds of a full device that `request` still needs for its steps."""
        share = request.rows / self._max_rows
        size = request.params.size
        return share * sum(count * self.seconds((size, depth), self._max_rows) for depth, count in request.left.items())

    def curves(self) -> Mapping[Kind, Mapping[int, float]]:
        """Everything measured."""
        with self._lock:
            return {kind: dict(sorted(known.items())) for kind, known in self._seconds.items()}


def _seconds(known: Mapping[int, float], rows: int) -> float:
    """By the curve that is `known`, from rows to seconds."""
    if rows in known:
        return known[rows]
    if not known:
        return 0.0
    counts, seconds = zip(*sorted(known.items()), strict=True)
    return float(np.interp(rows, counts, seconds) * max(rows / counts[-1], 1.0))
