"""Decides which requests take the next step together. Policy only: no device, no HTTP."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from server.requests.errors import ModelNotLoaded, NotReady, QueueFull
from server.requests.request import Flow, Request
from server.runtime.batching.fair_models import FairModels
from server.runtime.batching.line import Line
from server.runtime.batching.model_lines import ModelLines, Refusal
from server.runtime.batching.quick_requests import QuickRequests
from server.runtime.batching.step_times import StepTimeModel

_MAX_RETRY_AFTER = 120  # seconds; clients ignore more


class Batch(NamedTuple):
    """What the executor does before and in one step. `requests` share a line and fit the largest bucket."""

    left: tuple[Request, ...]  # cancelled since the last batch: to be released
    joined: tuple[Request, ...]  # newcomers to admit; an isolated one may wait for its first step
    requests: tuple[Request, ...]  # those that take the step; their next steps are of one depth


class Batcher:
    """Continuous batching at the step: newcomers join and the finished leave between steps; lines take turns.

    Models with requests have equal shares of the device's time, by the measured step times and the weight of their
    flows; the sizes of a model have as many turns each. `submit`, `check` and the counts are for any thread, as what
    says which models are accepted; `next_batch` and `leave` are for the executor's thread.
    """

    def __init__(
        self, *, max_waiting: int, line: Callable[[], Line] = Line, quick: QuickRequests | None = None
    ) -> None:
        """At most `max_waiting` requests wait, and a quarter more of callers who have no other one waiting.

        `line` makes the queue of a line, `quick` says which requests keep steps brief.
        """
        self._max_waiting = max_waiting
        self._reserved = math.ceil(max_waiting / 4)
        self._new_line = line
        self._models: dict[str, ModelLines] = {}
        self._shares = FairModels()
        self._quick = quick or QuickRequests()
        self._changed = threading.Condition()
        self._closed = self._woken = False

    def add(self, model: str, *, max_rows: int, lora_ranks: int = 0, step_times: StepTimeModel | None = None) -> None:
        """Accept requests for `model`, whose steps take at most `max_rows` and as long as `step_times` says.

        `lora_ranks` are those of its LoRA pool.
        """
        times = step_times or StepTimeModel(max_rows=max_rows)
        self._models[model] = ModelLines(
            max_rows=max_rows,
            lora_ranks=lora_ranks,
            step_times=times,
            quick=self._quick,
            line=self._new_line,
        )

    def set_max_rows(self, model: str, rows: int) -> None:
        """Let the steps of `model` take at most `rows`, no more than its engines do."""
        with self._changed:
            self._models[model].max_rows = rows

    @property
    def waiting(self) -> int:
        with self._changed:
            return self._waiting

    @property
    def _waiting(self) -> int:
        return sum(lines.waiting for lines in self._models.values())

    @property
    def running(self) -> int:
        with self._changed:
            return sum(len(lines.running) for lines in self._models.values())

    def submit(self, request: Request, *, proves: bool = False) -> int:
        """Queue `request`, and return how many wait before it. One that `proves` its model is always accepted.

        Raises:
            InvalidRequest: it can never fit. QueueFull: too many requests wait. ModelNotLoaded.
            NotReady: the server is draining.
        """
        lines = self._models[request.params.model]
        lines.check(request)
        with self._changed:
            before = self._waiting if proves and not self._closed else self._check(request.flow)
            if lines.refusal and not proves:
                raise ModelNotLoaded(lines.refusal.why, retry_after=lines.refusal.retry_after)
            if not lines:
                self._shares.join(request.params.model)
            lines.push(request)
            self._changed.notify()
        return before

    def check(self, caller: str) -> None:
        """Raise what `submit` would raise now for an interactive request of `caller`, before its body is read.

        Raises:
            QueueFull, NotReady
        """
        with self._changed:
            self._check(Flow(caller, "interactive"))

    def refuse(self, model: str, why: str, *, retry_after: int | None = None) -> None:
        """Refuse requests for `model` from now on; those accepted run to completion. `why` says what to do."""
        with self._changed:
            self._models[model].refusal = Refusal(why, retry_after)

    def refuse_idle(self, model: str, why: str) -> bool:
        """Refuse requests for `model` if none waits or runs; returns whether that is so."""
        with self._changed:
            if idle := not self._models[model]:
                self._models[model].refusal = Refusal(why, None)
            return idle

    def accept(self, model: str) -> None:
        """Accept requests for `model` again."""
        with self._changed:
            self._models[model].refusal = None

    def is_idle(self, model: str) -> bool:
        """Whether no request for `model` waits or runs."""
        with self._changed:
            return not self._models[model]

    def last_used(self, model: str) -> float:
        """When the last request for `model` came, on monotonic's clock."""
        return self._models[model].last_used

    def wake(self) -> None:
        """Let `next_batch` return: there is something else to do."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def position(self, request: Request) -> int | None:
        """How many requests of its line are served before `request`, if no others come; None where it does not wait."""
        with self._changed:
            before = self._models[request.params.model].before(request)
        return None if before is None else len(before)

    def delay(self, request: Request) -> float:
        """The seconds, at most, until `request` takes its first step, if no others come; 0 where that is unknown."""
        with self._changed:
            before = self._models[request.params.model].before(request)
            return 0.0 if before is None else self._work_with_running(before)

    def wait_of(self, newcomer: Request) -> float:
        """The seconds, at most, that `newcomer` would wait if it came now; 0 if it would join the next step.

        It is an estimate from the step times of a full device, the same for the same requests, and 0 where it is
        unknown.
        """
        with self._changed:
            lines = self._models[newcomer.params.model]
            ahead = lines.ahead_of(newcomer)
            return 0.0 if lines.has_rows_for(newcomer, ahead) else self._work_with_running(ahead)

    def _work_with_running(self, waiting: Iterable[Request]) -> float:
        """The seconds of a full device for all requests that run, and those of the `waiting`."""
        running = chain.from_iterable(lines.running for lines in self._models.values())
        return sum(map(self._work, (*running, *waiting)))

    def _work(self, request: Request) -> float:
        """The seconds of a full device that `request` still needs."""
        return self._models[request.params.model].step_times.work(request)

    def _check(self, flow: Flow) -> int:
        """How many requests wait, if one more of `flow` may."""
        if self._closed:
            raise NotReady("The server is shutting down: send the request to another one.", retry_after=5)
        before = self._waiting
        if before >= self._max_waiting and not self._has_reserved_place(flow, before):
            raise QueueFull(f"{before} requests are waiting: try again later.", retry_after=self._retry_after())
        return before

    def _has_reserved_place(self, flow: Flow, before: int) -> bool:
        """A queue that one caller keeps full has places for others."""
        first = not any(lines.has_waiting(flow) for lines in self._models.values())
        return first and before < self._max_waiting + self._reserved

    def next_batch(self, *, timeout: float | None = None) -> Batch | None:
        """Wait for work, at most `timeout` seconds, and return the next batch, which is empty if there is none.

        None: the batcher is closed, and nothing is left to do.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._woken or any(self._models.values()), timeout=timeout)
            self._woken = False
            left = tuple([request for lines in self._models.values() for request in lines.drop_cancelled()])
            if (model := self._next_model()) is None:
                self._shares.reset()
                return Batch(left, (), ()) if left or not self._closed else None
            joined, turn = self._models[model].take_turn()
            self._charge(model, joined, turn)
            return Batch(left, joined, turn)

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
        """The next request that may join those of the line whose turn is next, if there is one; it joins."""
        if (model := self._next_model()) is None:
            return None
        if newcomer := self._models[model].join_one():
            self._charge(model, (newcomer,), ())
        return newcomer

    def _next_model(self) -> str | None:
        """The model whose turn it is, of those with requests."""
        if len(self._models) == 1:  # what is usual
            (model,) = self._models
            return model if self._models[model] else None
        busy = [model for model, lines in self._models.items() if lines]
        return self._shares.next(busy) if busy else None

    def _charge(self, model: str, joined: tuple[Request, ...], turn: tuple[Request, ...]) -> None:
        """Count what the device does for `model`, where others may want it."""
        if len(self._models) > 1:
            lines = self._models[model]
            self._shares.serve(model, lines.seconds(joined, turn) / lines.weight)

    def leave(self, request: Request) -> None:
        """Remove `request` from the running: it takes no more steps."""
        with self._changed:
            self._models[request.params.model].leave(request)

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
            for lines in self._models.values():
                lines.clear()
        return evicted

    def _everyone(self) -> Iterator[Request]:
        return chain.from_iterable(self._models.values())

    def _retry_after(self) -> int:
        """Seconds until the requests that run and wait now will have taken their steps."""
        ahead = sum(map(self._work, self._everyone()))
        return min(max(math.ceil(ahead), 1), _MAX_RETRY_AFTER)
