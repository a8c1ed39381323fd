"""The calls in progress, for GET progress, interrupt and skip. For the event loop alone."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from server.api.service import Accepted
from server.requests.context import Caller
from server.requests.errors import STATUS, Cancelled, ServerError
from server.requests.params import Image
from server.requests.request import Outcome, Request, Started, Stepped

_INTERRUPTED = "The call was interrupted before an image was complete: send it again if you want the image."
_SKIPPED = "The image was skipped before it was complete."
_KEEPALIVE = 3600.0  # seconds; nothing is sent to the caller


@dataclass(eq=False)
class Task:
    """One call of txt2img or img2img: several requests, of which one runs."""

    caller: str
    job_count: int  # requests
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    job_no: int = 0
    step: int = 0
    steps: int = 0
    preview: Image | None = None
    is_skipped: bool = False  # the request that runs
    interrupted: ServerError | None = None
    started: float | None = None  # on perf_counter's clock
    timestamp: str = field(default_factory=lambda: time.strftime("%Y%m%d%H%M%S"))

    def __post_init__(self) -> None:
        self._request: Request | None = None
        self._wakes = asyncio.Event()

    @property
    def progress(self) -> float:
        """The share that is done: more than 0, which is what clients take for idle."""
        done = self.job_no + (self.step / self.steps if self.steps else 0)
        return min(max(done / self.job_count, 0.01), 1.0)

    @property
    def seconds_left(self) -> float:
        """An estimate from the time that passed since the first step; 0 before it."""
        if self.started is None:
            return 0.0
        passed = time.perf_counter() - self.started
        return passed / self.progress - passed

    async def wait_for_place(self, accept: Callable[[], Awaitable[Accepted]]) -> Accepted | None:
        """Queue the next request. Only the first of a call is refused where there are too many: others wait.

        None: the call was interrupted meanwhile.
        """
        while not self.interrupted:
            try:
                return await accept()
            except ServerError as error:
                if STATUS[type(error)] != HTTPStatus.TOO_MANY_REQUESTS or self.job_no == 0:
                    raise
                seconds = error.retry_after or 1
            await self.sleep(seconds)
        return None

    async def follow(self, accepted: Accepted) -> Outcome:
        """Follow a request to its outcome; whatever ends this ends the request too."""
        self._begin(accepted.request)
        try:
            async for event in accepted.event_queue.events(keepalive=_KEEPALIVE):
                match event:
                    case Started():
                        self.started = self.started or time.perf_counter()
                    case Stepped(step, steps, previews):
                        self.step, self.steps = step, steps
                        self.preview = previews[0] if previews else self.preview
                    case _ if isinstance(event, Outcome):
                        return event
            raise AssertionError("a request has an outcome")
        finally:
            accepted.request.cancel()  # without effect on a request that has ended
            self._end()

    async def sleep(self, seconds: float) -> None:
        """Wait, or until the call is interrupted."""
        try:
            await asyncio.wait_for(self._wakes.wait(), seconds)
        except TimeoutError:
            return

    def interrupt(self, reason: ServerError | None = None) -> None:
        """End the request that runs, and begin no other."""
        self.interrupted = self.interrupted or reason or Cancelled(_INTERRUPTED)
        self._wakes.set()
        if self._request:
            self._request.cancel(self.interrupted)

    def skip(self) -> None:
        """End the request that runs; the next one follows."""
        if self._request:
            self.is_skipped = True
            self._request.cancel(Cancelled(_SKIPPED))

    def _begin(self, request: Request) -> None:
        self._request = request
        self.is_skipped = False
        self.step, self.steps, self.preview = 0, request.steps, None
        if self.interrupted:
            request.cancel(self.interrupted)

    def _end(self) -> None:
        self._request = None
        self.job_no += 1
        self.step = 0


class Tasks:
    """The calls in progress: as many as callers wait for, which the queue bounds."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []  # in the order of their arrival

    @asynccontextmanager
    async def running(self, task: Task) -> AsyncIterator[Task]:
        """Have `task` among the calls in progress for the context."""
        self._tasks.append(task)
        try:
            yield task
        finally:
            self._tasks.remove(task)

    def of(self, caller: Caller) -> Iterator[Task]:
        """The calls that `caller` may see and interrupt: its own, oldest first, and all for an administrator."""
        own = [task for task in self._tasks if task.caller == caller.name]
        yield from own
        if caller.is_admin:
            yield from (task for task in self._tasks if task.caller != caller.name)
