"""A job that has not ended: its progress, and those who follow it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from server.api.event_queue import EventQueue
from server.api.service import Accepted
from server.jobs.job import Job, now
from server.requests.errors import Cancelled, ServerError
from server.requests.request import Failed, Outcome, Started, Stepped

_ENDED = Failed(Cancelled("The job has ended."))  # tells followers to look at the job


class LiveJob:
    """A job until its end is stored. For the event loop alone."""

    def __init__(self, job: Job) -> None:
        self.ended: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self.images: tuple[bytes, ...] = ()  # of a job that has ended, until they are stored
        self.accepted: Accepted | None = None  # None before the job of an earlier process is queued again
        self.started: datetime | None = None
        self.step = 0
        self._job = job
        self._followers: list[EventQueue] = []

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def job(self) -> Job:
        """The job as it is now."""
        if self.ended.done():
            return self.ended.result()
        if self.started is None:
            return self._job
        progress = {"status": "running", "started": self.started, "step": self.step}
        return self._job.with_facts(self._job.facts.model_copy(update=progress))

    @contextmanager
    def following(self) -> Iterator[EventQueue]:
        """The events from here on."""
        queue = EventQueue(follows=True)
        self._followers.append(queue)
        try:
            yield queue
        finally:
            self._followers.remove(queue)

    async def follow(self, accepted: Accepted, on_started: Callable[[], None]) -> Outcome:
        """Follow the request to its outcome. Followers hear of that in `end`."""
        self.accepted = accepted
        async for event in accepted.event_queue.events(keepalive=None):
            match event:
                case Started():
                    self.started = now()
                    on_started()
                case Stepped(step):
                    self.step = step
                case None:
                    continue
                case _:
                    return event
            for queue in self._followers:
                queue.on_event(accepted.request, event)
        raise AssertionError("the events of a request end with its outcome")

    def cancel(self, reason: ServerError | None = None) -> bool:
        """Ask for no more steps; returns False where there is no request yet that could be asked."""
        if self.accepted is None:
            return False
        self.accepted.request.cancel(reason)
        return True

    def end(self, job: Job, images: tuple[bytes, ...] = ()) -> None:
        """Let everyone see the end. Without effect on a job that has ended."""
        if self.ended.done():
            return
        self.images = images
        self.ended.set_result(job)
        for queue in self._followers:
            queue.on_event(None, _ENDED)
