"""Decides which requests take the next step together. Policy only: no device, no HTTP."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from engines.contract import MAX_CHUNKS
from engines.manifest import Size
from server.requests.errors import FieldError, InvalidRequest, NotReady, QueueFull
from server.requests.request import Depth, Flow, Request
from server.runtime.fair_queue import FairQueue
from server.runtime.fair_steps import FairSteps, fair_rows
from server.runtime.step_times import Kind

_MAX_RETRY_AFTER = 120  # seconds; clients ignore more


class Batch(NamedTuple):
    """What the executor does before and in one step. `requests` share a size and fit the largest bucket."""

    left: tuple[Request, ...]  # cancelled since the last batch: to be released
    joined: tuple[Request, ...]  # newcomers to admit; an isolated one may wait for its first step
    requests: tuple[Request, ...]  # those that take the step; their next steps are of one depth


class Line:
    """The requests of one image size, and the policy of continuous batching among them. Subclass it for another policy.

    Called by a `Batcher` under its lock. Running requests share each step, or take turns where their rows exceed it.
    """

    def __init__(self) -> None:
        self.waiting = FairQueue()
        self.running: list[Request] = []  # in the order of their turns
        self.rows: Counter[Flow] = Counter()  # of the running requests
        self.turns = 0.0  # that it had, by weight
        self._fair_steps = FairSteps()

    @property
    def weight(self) -> float:
        """That of its flow with the greatest weight."""
        return max(flow.weight for flow in (*self.rows, *self.waiting.flows))

    def join(self, max_rows: int) -> Iterator[Request]:
        """Move requests from waiting to running, in the queue's order, while the next one may join; yield each."""
        while self.waiting and self.may_join(self.waiting.peek(), max_rows):
            newcomer = self.waiting.pop()
            self.running.append(newcomer)
            self.rows[newcomer.flow] += newcomer.rows
            yield newcomer

    def may_join(self, newcomer: Request, max_rows: int) -> bool:
        """Whether there are rows for it, or memory for it to take turns with a much longer or a greedy one.

        So a short request does not wait until long ones are done, and a caller not until those of another are.
        """
        everyone = [*self.running, newcomer]
        if sum([request.rows for request in everyone]) <= max_rows:
            return True
        is_short = any(newcomer.work <= request.work_left / 2 for request in self.running)
        return (is_short or self._is_owed_rows(newcomer, max_rows)) and _fit_in_memory(everyone, max_rows)

    def _is_owed_rows(self, newcomer: Request, max_rows: int) -> bool:
        """Whether its flow has no rows, and another one has a request more than its share, or less weight."""
        if newcomer.flow in self.rows:
            return False
        weights = sum(flow.weight for flow in (*self.rows, newcomer.flow))
        return any(
            flow.weight < newcomer.flow.weight
            or rows - min(one.rows for one in self.running if one.flow == flow) >= max_rows * flow.weight / weights
            for flow, rows in self.rows.items()
        )

    def take_turn(self, max_rows: int, fair_rows: int) -> tuple[Request, ...]:
        """The requests of the next step: the one that is next, and those that can share the step with it.

        Where several flows run, and cannot all take it, they are at most `fair_rows`; see `FairSteps`.
        """
        turn = self._turn(max_rows, fair_rows)
        if len(turn) < len(self.running):
            taken = set(turn)
            self.running = [*(one for one in self.running if one not in taken), *turn]
        if self.waiting:
            self.waiting.advance(sum([request.rows for request in turn]), self.running)
        return turn

    def _turn(self, max_rows: int, fair_rows: int) -> tuple[Request, ...]:
        first = self.running[0]
        turn = (first,) if first.params.isolated else self._sharing(first.depth, max_rows)
        everyone_fits = len(turn) == len(self.running) and sum(self.rows.values()) <= fair_rows
        alone = len(self.rows) == 1 and fair_rows == max_rows
        if alone or everyone_fits:
            self._fair_steps.forget()
            return turn
        return self._fair_steps.choose(self.running, max_rows=max_rows, fair_rows=fair_rows)

    def _sharing(self, depth: Depth, max_rows: int) -> tuple[Request, ...]:
        """The requests that may take their next step in one call of that depth, as far as their rows fit in it."""
        free = max_rows
        turn = []
        for one in self.running:
            if one.rows <= free and one.depth == depth and not one.params.isolated:
                free -= one.rows
                turn.append(one)
        return tuple(turn)

    def leave(self, request: Request) -> None:
        """Remove `request` from the running."""
        self.running = [running for running in self.running if running is not request]
        self.rows = Counter()
        for running in self.running:
            self.rows[running.flow] += running.rows

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


def _fit_in_memory(requests: Sequence[Request], max_rows: int) -> bool:
    """Whether the pools of one size hold `requests`: slots, prompt chunks, and features of the step cache."""
    images = sum([request.images for request in requests])
    chunks = sum([request.chunks for request in requests])
    features = sum([request.rows for request in requests if request.params.cache != "off"])
    return images <= max_rows and chunks <= max_rows * MAX_CHUNKS and features <= max_rows


class Batcher:
    """Continuous batching at the step: newcomers join and the finished leave between steps; sizes take turns.

    `submit`, `check` and the counts are for any thread; `next_batch` and `leave` are for the executor's thread.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_waiting: int,
        work: Callable[[Request], float] = lambda _request: 1.0,
        seconds: Callable[[Kind, int], float] = lambda _kind, _rows: 0.0,
        line: Callable[[], Line] = Line,
    ) -> None:
        """At most `max_waiting` requests wait, and a quarter more of callers who have no other one waiting.

        Args:
            work: estimates the seconds of a full device that a request still needs.
            seconds: estimates what a step of a kind and number of rows takes; 0 if unknown.
            line: makes the queue of a size.
        """
        self.max_rows = max_rows
        self._max_waiting = max_waiting
        self._reserved = math.ceil(max_waiting / 4)
        self._work = work
        self._seconds = seconds
        self._new_line = line
        self._lines: dict[Size, Line] = {}  # in the order of their turns
        self._changed = threading.Condition()
        self._closed = False

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(len(line.waiting) for line in self._lines.values())

    @property
    def running(self) -> int:
        with self._changed:
            return sum(len(line.running) for line in self._lines.values())

    def submit(self, request: Request) -> int:
        """Queue `request`, and return how many wait before it.

        Raises:
            InvalidRequest: it can never fit. QueueFull: too many requests wait. NotReady: the server is draining.
        """
        if request.rows > self.max_rows:
            message = (
                f"{request.images} images take {request.rows} UNet rows, this server's engines take {self.max_rows}: "
                "ask for fewer images."
            )
            raise InvalidRequest(message, fields=(FieldError("num_images", message),))
        with self._changed:
            before = self._check(request.flow)
            if request.params.size not in self._lines:
                line = self._lines[request.params.size] = self._new_line()
                line.turns = min((other.turns for other in self._lines.values() if other is not line), default=0.0)
            self._lines[request.params.size].waiting.push(request)
            self._changed.notify()
        return before

    def check(self, caller: str) -> None:
        """Raise what `submit` would raise now for an interactive request of `caller`, before its body is read.

        Raises:
            QueueFull, NotReady
        """
        with self._changed:
            self._check(Flow(caller, "interactive"))

    def position(self, request: Request) -> int | None:
        """How many requests are served before `request`, if no others come; None where it does not wait."""
        with self._changed:
            before = self._before(request)
        return None if before is None else len(before)

    def delay(self, request: Request) -> float:
        """The seconds, at most, until `request` takes its first step, if no others come; 0 where that is unknown."""
        with self._changed:
            before = self._before(request)
            if before is None:
                return 0.0
            running = chain.from_iterable(line.running for line in self._lines.values())
            return sum(self._work(one) for one in (*running, *before))

    def _before(self, request: Request) -> list[Request] | None:
        line = self._lines.get(request.params.size)
        return line.waiting.before(request) if line else None

    def _check(self, flow: Flow) -> int:
        """How many requests wait, if one more of `flow` may."""
        if self._closed:
            raise NotReady("The server is shutting down: send the request to another one.", retry_after=5)
        before = sum(len(line.waiting) for line in self._lines.values())
        if before >= self._max_waiting and not self._has_reserved_place(flow, before):
            raise QueueFull(f"{before} requests are waiting: try again later.", retry_after=self._retry_after())
        return before

    def _has_reserved_place(self, flow: Flow, before: int) -> bool:
        """A queue that one caller keeps full has places for others."""
        first = not any(line.waiting.count(flow) for line in self._lines.values())
        return first and before < self._max_waiting + self._reserved

    def next_batch(self, *, timeout: float | None = None) -> Batch | None:
        """Wait for work, at most `timeout` seconds, and return the next batch, which is empty if there is none.

        None: the batcher is closed, and nothing is left to do.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._lines, timeout=timeout)
            left = tuple([request for line in self._lines.values() for request in line.drop_cancelled()])
            if left:
                self._remove_empty_lines()
            if not self._lines:
                return Batch(left, (), ()) if left or not self._closed else None
            size = self._next_size()
            line = self._lines[size]
            joined = tuple(line.join(self.max_rows))
            return Batch(left, joined, line.take_turn(self.max_rows, self._fair_rows(size)))

    def next_newcomer(self, *, timeout: float) -> Request | None:
        """Let one request join those that may take the next step. Wait for it at most `timeout` seconds.

        The turns are not touched: `next_batch` will say who takes the step.
        """
        with self._changed:
            if newcomer := self._joining():
                return newcomer
            self._changed.wait(timeout)
            return self._joining()

    def _joining(self) -> Request | None:
        """The next request that may join those of the size whose turn is next, if there is one; it joins."""
        if not self._lines:
            return None
        line = min(self._lines.values(), key=lambda line: line.turns)
        return next(line.join(self.max_rows), None)

    def _next_size(self) -> Size:
        """The size whose turn it is: of several with as many turns, the one that waited longest."""
        if len(self._lines) == 1:
            return next(iter(self._lines))
        size = min(self._lines, key=lambda one: self._lines[one].turns)
        line = self._lines[size] = self._lines.pop(size)
        line.turns += 1 / line.weight
        return size

    def _fair_rows(self, size: Size) -> int:
        """The most rows that a step of `size` may take, for the sake of the other flows that run; see `fair_rows`."""
        if len(self._lines) == 1 and len(self._lines[size].rows) == 1:  # what is usual, without looking further
            return self.max_rows
        if len({flow for line in self._lines.values() for flow in line.rows}) == 1:
            return self.max_rows
        alone = [
            {flow: self._seconds((size, "full"), min(rows, self.max_rows)) for flow, rows in line.rows.items()}
            for size, line in self._lines.items()
        ]
        seconds = partial(self._seconds, (size, "full"))
        return fair_rows(self._lines[size].rows, alone, seconds, max_rows=self.max_rows)

    def leave(self, request: Request) -> None:
        """Remove `request` from the running: it takes no more steps."""
        with self._changed:
            if line := self._lines.get(request.params.size):
                line.leave(request)
            self._remove_empty_lines()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Accept no more requests; those accepted run to completion."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """Accept no more requests, and cancel those accepted."""
        self.close()
        with self._changed:
            for request in self._everyone():
                request.cancel()

    def evict(self) -> tuple[Request, ...]:
        """Remove and return all requests that wait or run: they take no more steps."""
        with self._changed:
            evicted = tuple(self._everyone())
            self._lines.clear()
        return evicted

    def _everyone(self) -> Iterator[Request]:
        return chain.from_iterable(self._lines.values())

    def _remove_empty_lines(self) -> None:
        self._lines = {size: line for size, line in self._lines.items() if line.waiting or line.running}

    def _retry_after(self) -> int:
        """Seconds until the requests that run and wait now will have taken their steps."""
        ahead = sum(self._work(request) for request in self._everyone())
        return min(max(math.ceil(ahead), 1), _MAX_RETRY_AFTER)
