"""The requests that may share steps: of one model and one image size. Policy only: no device, no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from engines.contract import MAX_CHUNKS
from server.requests.request import Flow, Request
from server.runtime.batching.fair_queue import FairQueue
from server.runtime.batching.fair_steps import FairSteps
from server.runtime.batching.quick_requests import QuickRequests


class Line:
    """The requests of one line, and the policy of continuous batching among them. Subclass it for another policy.

    Called by a `Batcher` under its lock. Running requests share each step, or take turns where their rows exceed it.
    """

    def __init__(self) -> None:
        self.waiting = FairQueue()
        self.running: list[Request] = []  # in the order of their turns
        self.turns = 0.0  # that it had, by weight
        self.has_room: Callable[[Request], bool] = lambda _next: True  # for the LoRAs of the next one
        self.quick = QuickRequests()
        self._fair_steps = FairSteps()
        self._passed_over = False  # the one whose turn it was, in the last step

    @property
    def weight(self) -> float:
        """That of its flow with the greatest weight."""
        return max(flow.weight for flow in (*self.rows, *self.waiting.flows))

    @property
    def rows(self) -> Counter[Flow]:
        """UNet rows of the running requests. They become fewer when guidance ends."""
        rows = Counter[Flow]()
        for running in self.running:
            rows[running.flow] += running.rows
        return rows

    def join(self, max_rows: int) -> Iterator[Request]:
        """Move requests from waiting to running, in the queue's order, while the next one may join; yield each.

        Where that one waits for rows, quick requests of other flows do not wait behind it.
        """
        while newcomer := self._next(max_rows):
            self.waiting.pop(newcomer)
            self.running.append(newcomer)
            yield newcomer

    def _next(self, max_rows: int) -> Request | None:
        """The request to join next, if one may."""
        if not self.waiting:
            return None
        first, *others = self.waiting.heads()
        if self.may_join(first, max_rows):
            return first if self.has_room(first) else None
        overtaking = self._overtaking(first, others, max_rows)
        return next((one for one in overtaking if self.may_join(one, max_rows) and self.has_room(one)), None)

    def _overtaking(self, first: Request, others: Sequence[Request], max_rows: int) -> Iterator[Request]:
        """The quick ones of `others`, as far as they leave memory for `first`, which joins when longer ones have ended.

        So it does not wait for ever, however many quick ones come.
        """
        quick = self.quick.among((*self.running, *others))
        staying = [one for one in self.running if one in quick]
        return (one for one in others if one in quick and _fit_in_memory([first, *staying, one], max_rows))

    def may_join(self, newcomer: Request, max_rows: int) -> bool:
        """Whether there are rows for it, or memory for it to take turns with a much longer or a greedy one.

        So a short request does not wait until long ones are done, and a caller not until those of another are. Longer
        ones do not wait for the rows of quick ones, and leave an eighth of the slots to those that are expected.
        """
        everyone = [*self.running, newcomer]
        if not _fit_in_memory(everyone, max_rows):
            return False
        quick = self.quick.among(everyone)
        longer = [one for one in everyone if one not in quick]
        if self.quick.expected and newcomer not in quick and not _leave_places(longer, max_rows):
            return False
        if sum([one.rows for one in (everyone if newcomer in quick else longer)]) <= max_rows:
            return True
        is_short = any(newcomer.work <= request.work_left / 2 for request in self.running)
        return is_short or self._is_owed_rows(newcomer, max_rows)

    def _is_owed_rows(self, newcomer: Request, max_rows: int) -> bool:
        """Whether its flow has no rows, and another one has a request more than its share, or less weight."""
        flows = self.rows
        if newcomer.flow in flows:
            return False
        weights = sum(flow.weight for flow in (*flows, newcomer.flow))
        return any(
            flow.weight < newcomer.flow.weight
            or rows - min(one.rows for one in self.running if one.flow == flow) >= max_rows * flow.weight / weights
            for flow, rows in flows.items()
        )

    def take_turn(self, max_rows: int, fair_rows: int) -> tuple[Request, ...]:
        """The requests of the next step: the one that is next, and those that can share the step with it.

        Where they cannot all take it, they are at most `fair_rows` (see `FairSteps`), and quick ones go before
        others, though not twice in succession before the one whose turn it is.
        """
        turn = self._turn(max_rows, fair_rows)
        self._passed_over = self.running[0] not in turn
        if len(turn) < len(self.running):
            taken = set(turn)
            self.running = [*(one for one in self.running if one not in taken), *turn]
        if self.waiting:
            self.waiting.advance(sum([request.rows for request in turn]), self.running)
        return turn

    def _turn(self, max_rows: int, fair_rows: int) -> tuple[Request, ...]:
        turn = _sharing(self.running, max_rows)
        everyone_fits = len(turn) == len(self.running) and sum([one.rows for one in turn]) <= fair_rows
        if everyone_fits:
            self._fair_steps.forget()
            return turn
        quick = frozenset[Request]() if self._passed_over else self.quick.among(self.running)
        order = sorted(self.running, key=lambda one: one not in quick)
        if len(self.rows) == 1 and fair_rows == max_rows:
            self._fair_steps.forget()
            return _sharing(order, max_rows)
        return self._fair_steps.choose(order, max_rows=max_rows, fair_rows=fair_rows)

    def leave(self, request: Request) -> None:
        """Remove `request` from the running."""
        self.running = [running for running in self.running if running is not request]

    def drop_cancelled(self) -> frozenset[Request]:
        """Remove and return the cancelled. Each is asked once, since any thread may cancel at any moment."""
        dropped = frozenset([request for request in self if request.cancelled])
        if dropped:
            self.waiting.discard(dropped)
            for request in dropped:
                self.leave(request)
        return dropped

    def __iter__(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting


def _sharing(order: Sequence[Request], max_rows: int) -> tuple[Request, ...]:
    """The first of `order`, and those that may take their next step in one call with it, as far as their rows fit."""
    first, free = order[0], max_rows
    if first.params.isolated:
        return (first,)
    turn = []
    for one in order:
        if one.rows <= free and one.depth == first.depth and not one.params.isolated:
            free -= one.rows
            turn.append(one)
    return tuple(turn)


def _leave_places(requests: Sequence[Request], max_rows: int) -> bool:
    """Whether `requests` leave an eighth of the slots free; one alone may take all."""
    images = sum([one.images for one in requests])
    return len(requests) == 1 or images <= max_rows - (max_rows + 4) // 8


def _fit_in_memory(requests: Sequence[Request], max_rows: int) -> bool:
    """Whether the pools of one size hold `requests`: slots, prompt chunks, and features of the step cache."""
    images = sum([request.images for request in requests])
    chunks = sum([request.chunks for request in requests])
    features = sum([request.rows for request in requests if request.params.reuses_features])
    return images <= max_rows and chunks <= max_rows * MAX_CHUNKS and features <= max_rows
