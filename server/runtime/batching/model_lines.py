"""The lines of one model: one for each image size, which take turns. Policy only: no device, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from engines.manifest import Size
from server.requests.errors import FieldError, InvalidRequest
from server.requests.request import Flow, Request
from server.runtime.batching.fair_steps import fair_rows
from server.runtime.batching.line import Line
from server.runtime.batching.lora_room import LoraRoom
from server.runtime.batching.quick_requests import QuickRequests
from server.runtime.batching.step_times import StepTimeModel, kind_of

_UNMEASURED = 1.0  # seconds that a step counts for while none was measured: models take turns then


class Refusal(NamedTuple):
    """Why requests for a model are refused."""

    why: str  # and what to do
    retry_after: int | None  # seconds, where it will be accepted by itself


class ModelLines:
    """The requests of one model that wait or run. Called by a `Batcher` under its lock."""

    def __init__(
        self,
        *,
        max_rows: int,
        lora_ranks: int,
        step_times: StepTimeModel,
        quick: QuickRequests,
        line: Callable[[], Line],
    ) -> None:
        """Steps take at most `max_rows`, the pool `lora_ranks`; `line` makes the queue of a size.

        `quick` are those of all models, which wait for each other's steps.
        """
        self.max_rows = max_rows
        self._loras = LoraRoom(lora_ranks)
        self.step_times = step_times
        self._quick = quick
        self.refusal: Refusal | None = None
        self.last_used = 0.0  # when the last request came, on monotonic's clock
        self._new_line = line
        self._lines: dict[Size, Line] = {}  # in the order of their turns

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._lines.values())

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def waiting(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    @property
    def running(self) -> tuple[Request, ...]:
        return tuple(chain.from_iterable(line.running for line in self._lines.values()))

    @property
    def weight(self) -> float:
        """That of its flow with the greatest weight."""
        return max(line.weight for line in self._lines.values())

    def check(self, request: Request) -> None:
        """Raise InvalidRequest where `request` can never fit."""
        if request.rows > self.max_rows:
            message = (
                f"{request.images} images take {request.rows} UNet rows, this server's engines take {self.max_rows}: "
                "ask for fewer images."
            )
            raise InvalidRequest(message, fields=(FieldError("num_images", message),))
        if request.ranks > self._loras.ranks:
            message = f"LoRAs of {request.ranks} ranks do not fit into {self._loras.ranks}: ask for fewer LoRAs."
            raise InvalidRequest(message, fields=(FieldError("loras", message),))

    def push(self, request: Request) -> None:
        """Let `request` wait."""
        self.last_used = time.monotonic()
        self._quick.came(request, self.step_times.alone(request))
        size = request.params.size
        if size not in self._lines:
            line = self._lines[size] = self._new_line()
            line.quick = self._quick
            line.has_room = lambda newcomer: self._loras.admits(newcomer, line, self.running)
            line.turns = min((other.turns for other in self._lines.values() if other is not line), default=0.0)
        self._lines[size].waiting.push(request)

    def has_waiting(self, flow: Flow) -> bool:
        return any(line.waiting.count(flow) for line in self._lines.values())

    def before(self, request: Request) -> list[Request] | None:
        """The requests of its line that are served before `request`; None where it does not wait."""
        line = self._lines.get(request.params.size)
        return line.waiting.before(request) if line else None

    def ahead_of(self, newcomer: Request) -> list[Request]:
        """The requests of its line that would be served before `newcomer` if it came now."""
        line = self._lines.get(newcomer.params.size)
        return line.waiting.ahead_of(newcomer) if line else []

    def has_rows_for(self, newcomer: Request, ahead: Sequence[Request]) -> bool:
        """Whether a step has rows for `newcomer` besides the requests of its size that run or are `ahead` of it."""
        line = self._lines.get(newcomer.params.size)
        running: Sequence[Request] = line.running if line else ()
        return sum([one.rows for one in (*running, *ahead, newcomer)]) <= self.max_rows

    def join_one(self) -> Request | None:
        """Let the next request join those of the size whose turn is next, if there is one that may."""
        line = min(self._stepping().values(), key=lambda line: line.turns)
        return next(line.join(self.max_rows), None)

    def take_turn(self) -> tuple[tuple[Request, ...], tuple[Request, ...]]:
        """The requests that join the size whose turn it is, and those that take its step."""
        size = self._next_size()
        line = self._lines[size]
        joined = tuple(line.join(self.max_rows))
        rows = min(self._fair_rows(size), self._brief_rows(size))
        self._quick.stepped()
        return joined, line.take_turn(self.max_rows, rows)

    def drop_cancelled(self) -> tuple[Request, ...]:
        """Remove and return the cancelled."""
        left = tuple([request for line in self._lines.values() for request in line.drop_cancelled()])
        if left:
            self._remove_empty_lines()
        return left

    def leave(self, request: Request) -> None:
        """Remove `request` from the running."""
        if line := self._lines.get(request.params.size):
            line.leave(request)
        self._remove_empty_lines()

    def clear(self) -> None:
        self._lines.clear()

    def seconds(self, joined: Sequence[Request], turn: Sequence[Request]) -> float:
        """What the device needs to encode and decode those who `joined`, and for the step `turn`, if there is one."""
        times = self.step_times
        seconds = sum([times.encode_decode(one.params.size, one.params.decoder) * one.images for one in joined])
        if turn:
            kind = kind_of(turn[0].params.size, turn[0].depth, loras=_any_loras(turn))
            seconds += times.seconds(kind, sum([one.rows for one in turn])) or _UNMEASURED
        return seconds

    def _stepping(self) -> dict[Size, Line]:
        """The lines that may take a step: in the others everyone waits for LoRAs that run at other sizes."""
        lines = self._lines.items()
        return {size: line for size, line in lines if line.running or line.has_room(line.waiting.peek())}

    def _remove_empty_lines(self) -> None:
        self._lines = {size: line for size, line in self._lines.items() if line.waiting or line.running}

    def _next_size(self) -> Size:
        """The size whose turn it is: of several with as many turns, the one that waited longest."""
        if len(self._lines) == 1:
            return next(iter(self._lines))
        size = min(self._stepping(), key=lambda one: self._lines[one].turns)
        line = self._lines[size] = self._lines.pop(size)
        line.turns += 1 / line.weight
        return size

    def _brief_rows(self, size: Size) -> int:
        """The most rows that a step of `size` may take, for the sake of quick requests that wait for it, or may come.

        Quick requests among themselves take full steps.
        """
        running = self._lines[size].running
        quick = self._quick.among(running)
        if len(quick) == len(running):
            return self.max_rows
        limits = self._quick.limits(partial(self._seconds, size, requests=running), max_rows=self.max_rows)
        return limits.with_quick if quick else limits.without

    def _fair_rows(self, size: Size) -> int:
        """The most rows that a step of `size` may take, for the sake of the other flows that run; see `fair_rows`."""
        if len({one.flow for line in self._lines.values() for one in line.running}) == 1:
            return self.max_rows
        alone = [
            {
                flow: self._seconds(size, min(rows, self.max_rows), [one for one in line.running if one.flow == flow])
                for flow, rows in line.rows.items()
            }
            for size, line in self._lines.items()
        ]
        seconds = partial(self._seconds, size, requests=self._lines[size].running)
        return fair_rows(self._lines[size].rows, alone, seconds, max_rows=self.max_rows)

    def _seconds(self, size: Size, rows: int, requests: Sequence[Request]) -> float:
        """What a full step of so many rows takes, if `requests` are in it."""
        return self.step_times.seconds(kind_of(size, "full", loras=_any_loras(requests)), rows)


def _any_loras(requests: Iterable[Request]) -> bool:
    return any(request.ranks for request in requests)
