"""One simulated server: continuous batching by its step curve, visited only at the steps where something may change.

It follows the policy of `server.runtime.batching` for one model, one image size and one caller, in whole steps; a test
compares both. The server's own work on the processor takes no time here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster.curve import StepCurve
from benchmarks.cluster.workload import RequestKind

_ALIKE = 1.5  # times the seconds of the quickest kind, alone: requests that are about as quick
_EARLY = 1e-9  # steps by which rounding may put a moment after the end of a step


@dataclass(frozen=True, slots=True)
class KindOnServer:
    """What a kind of request takes of a server."""

    rows: int
    images: int
    steps: int
    is_quick: bool
    encode_decode: float  # seconds

    @property
    def work(self) -> int:
        return self.rows * self.steps


def kinds_on_server(curve: StepCurve, mix: Sequence[RequestKind]) -> tuple[KindOnServer, ...]:
    alone = [curve.alone(rows=kind.rows, steps=kind.steps, images=kind.images) for kind in mix]
    return tuple(
        KindOnServer(
            kind.rows, kind.images, kind.steps, seconds <= min(alone) * _ALIKE, kind.images * curve.encode_decode
        )
        for kind, seconds in zip(mix, alone, strict=True)
    )


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request on its way: its number, what it asks for, when it arrived, and whether it was sent a second time."""

    number: int
    kind: KindOnServer
    at: float
    retried: bool = False
    left: int = 0  # steps


class SimulatedServer:
    """A server whose queue holds at most `max_waiting`; at `due` its state may change, never if that is infinity."""

    def __init__(self, curve: StepCurve, *, max_waiting: int, expects_quick: bool = True) -> None:
        self._max_rows, self._seconds = curve.max_rows, curve.by_rows()
        self._max_waiting, self._expects_quick = max_waiting, expects_quick
        self.due = math.inf
        self.served = 0  # rows of all steps so far: the server's `latentd_step_rows_sum`
        self._at = 0.0  # when the next step begins
        self._running: list[OpenRequest] = []  # in the order of their turns
        self._waiting: list[tuple[float, int, OpenRequest]] = []  # a heap, by the end of a fair share
        self._turn: list[OpenRequest] = []  # those that take the next step
        self._step_seconds = 0.0  # of that step
        self._passed_over = False
        self._clock = 0.0  # of the fair queue, in rows times steps

    @property
    def open(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def arrive(self, now: float, request: OpenRequest) -> bool:
        """Queue `request` until the next step begins; False if the queue is full."""
        if len(self._waiting) >= self._max_waiting:
            return False
        request.left = request.kind.steps
        heapq.heappush(self._waiting, (self._clock + request.kind.work, request.number, request))
        self.due = min(self.due, self._next_step(now))
        return True

    def change(self) -> tuple[float, list[OpenRequest]]:
        """Take the steps until `due`; returns the requests that are done, and when they are."""
        self._take_steps()
        done = [one for one in self._turn if not one.left]
        if done:
            self._running = [one for one in self._running if one.left]
            self._at += sum([one.kind.encode_decode for one in done])
        self._join()
        self._choose_turn()
        return self._at, done

    def fail(self) -> list[OpenRequest]:
        """Lose every request; returns them."""
        lost = [*self._running, *(entry[2] for entry in self._waiting)]
        self._running, self._waiting, self._turn, self.due = [], [], [], math.inf
        return lost

    def _next_step(self, now: float) -> float:
        """When the first step begins that a request can join which arrives now."""
        if not self._turn or now <= self._at:
            return max(now, self._at)
        return self._at + math.ceil((now - self._at) / self._step_seconds - _EARLY) * self._step_seconds

    def _take_steps(self) -> None:
        taken = round((self.due - self._at) / self._step_seconds) if self._turn else 0
        for one in self._turn:
            one.left -= taken
        served = taken * sum([one.kind.rows for one in self._turn])
        self.served += served
        if self._waiting and served:
            self._clock += served / self.open
        self._at = max(self.due, self._at)

    def _join(self) -> None:
        while self._waiting and self._may_join(self._waiting[0][2].kind):
            self._running.append(heapq.heappop(self._waiting)[2])

    def _may_join(self, newcomer: KindOnServer) -> bool:
        """As `Line.may_join`."""
        running = [one.kind for one in self._running]
        if sum([kind.images for kind in running]) + newcomer.images > self._max_rows:
            return False
        longer = [kind for kind in running if not kind.is_quick]
        if self._expects_quick and not newcomer.is_quick and longer:
            places = self._max_rows - (self._max_rows + 4) // 8
            if sum([kind.images for kind in longer]) + newcomer.images > places:
                return False
        sharing = running if newcomer.is_quick else longer
        if sum([kind.rows for kind in sharing]) + newcomer.rows <= self._max_rows:
            return True
        return any(newcomer.work <= one.kind.rows * one.left / 2 for one in self._running)

    def _choose_turn(self) -> None:
        """Who takes the next step, and until when no other one does; as `Line.take_turn`."""
        rows = sum([one.kind.rows for one in self._running])
        steps, self._turn = 1, self._running
        if rows > self._max_rows:
            rows, self._turn = self._share()
        elif self._running:
            self._passed_over = False
            steps = min([one.left for one in self._running])
        self._step_seconds = self._seconds[rows]
        self.due = self._at + steps * self._step_seconds if self._turn else math.inf

    def _share(self) -> tuple[int, list[OpenRequest]]:
        """The rows and the requests of a step that not all can take; their turn comes last then."""
        first = self._running[0]
        order = self._running if self._passed_over else sorted(self._running, key=lambda one: not one.kind.is_quick)
        turn, rows = [], 0
        for one in order:
            if rows + one.kind.rows <= self._max_rows:
                turn.append(one)
                rows += one.kind.rows
        self._passed_over = first not in turn
        taken = set(turn)
        self._running = [*(one for one in self._running if one not in taken), *turn]
        return rows, turn
