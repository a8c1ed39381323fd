"""Decides which requests take the next step together. Policy only: no device, no HTTP."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from engines.contract import MAX_CHUNKS
from engines.manifest import Size
from server.requests.errors import FieldError, InvalidRequest, NotReady, QueueFull
from server.requests.request import Depth, Request
from server.runtime.fair_queue import FairQueue

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

    def join(self, max_rows: int) -> Iterator[Request]:
        """Move requests from waiting to running, in the queue's order, while the next one may join; yield each."""
        while self.waiting and self.may_join(self.waiting.peek(), max_rows):
            newcomer = self.waiting.pop()
            self.running.append(newcomer)
            yield newcomer

    def may_join(self, newcomer: Request, max_rows: int) -> bool:
        """Whether there are rows for it, or memory for it to take turns with a much longer one.

        So a short request does not wait until long ones are done.
        """
        everyone = [*self.running, newcomer]
        if sum([request.rows for request in everyone]) <= max_rows:
            return True
        is_short = any(newcomer.work <= request.work_left / 2 for request in self.running)
        return is_short and _fit_in_memory(everyone, max_rows)

    def take_turn(self, max_rows: int) -> tuple[Request, ...]:
        """The requests of the next step: the one that waited longest, and all that can share the step with it."""
        first = self.running[0]
        turn = (first,) if first.params.isolated else self._sharing(first.depth, max_rows)
        if len(turn) < len(self.running):
            taken = set(turn)
            self.running = [*(one for one in self.running if one not in taken), *turn]
        if self.waiting:
            self.waiting.advance(sum([request.rows for request in turn]), self.running)
        return turn

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
        line: Callable[[], Line] = Line,
    ) -> None:
        """At most `max_waiting` requests wait, and a quarter more of callers who have no other one waiting.

        `work` estimates the seconds of a full device that a request still needs; `line` makes a size's queue.
        """
        self.max_rows = max_rows
        self._max_waiting = max_waiting
        self._reserved = math.ceil(max_waiting / 4)
        self._work = work
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
            before = self._check(request.caller)
            if request.params.size not in self._lines:
                self._lines[request.params.size] = self._new_line()
            self._lines[request.params.size].waiting.push(request)
            self._changed.notify()
        return before

    def check(self, caller: str) -> None:
        """Raise what `submit` would raise now for any request of `caller`, before its body is read.

        Raises:
            QueueFull, NotReady
        """
        with self._changed:
            self._check(caller)

    def _check(self, caller: str) -> int:
        """How many requests wait, if one more of `caller` may."""
        if self._closed:
            raise NotReady("The server is shutting down: send the request to another one.", retry_after=5)
        before = sum(len(line.waiting) for line in self._lines.values())
        if before >= self._max_waiting and not self._has_reserved_place(caller, before):
            raise QueueFull(f"{before} requests are waiting: try again later.", retry_after=self._retry_after())
        return before

    def _has_reserved_place(self, caller: str, before: int) -> bool:
        """A queue that one caller keeps full has places for others."""
        first = not any(line.waiting.count(caller) for line in self._lines.values())
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
            size = next(iter(self._lines))
            line = self._lines[size] = self._lines.pop(size)  # its turn is now, the next one after all others
            joined = tuple(line.join(self.max_rows))
            return Batch(left, joined, line.take_turn(self.max_rows))

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
