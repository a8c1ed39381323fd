"""What every face needs: one way in for requests, one way to write pictures, one way to describe the model."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from starlette.concurrency import run_in_threadpool

from engines.manifest import Manifest
from server.api.event_queue import EventQueue
from server.requests import images
from server.requests.errors import NotReady
from server.requests.images import ImageFormat
from server.requests.intake import Intake
from server.requests.request import Completed, Request
from server.requests.schemas import GenerateRequest
from server.runtime.batcher import Batcher
from server.runtime.executor import Executor
from server.runtime.metrics import Metrics

_READERS = 2  # pictures that are decoded at once: each may take a second, and 250 MB of memory


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request in the queue, and the ticket its caller waits with."""

    request: Request
    event_queue: EventQueue
    position: int  # how many waited before it


@dataclass(frozen=True, slots=True)
class Files:
    """Encoded pictures, and the seconds that took."""

    contents: tuple[bytes, ...]
    seconds: float


@dataclass(slots=True)
class Service:
    """The rooms behind the HTTP faces."""

    manifest: Manifest  # of what was asked for, and once it is loaded, with the engines that were compiled for that
    backend: str
    intake: Intake
    batcher: Batcher
    executor: Executor
    metrics: Metrics
    readers: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, _READERS))
    # No more of them than cores: most of their work is without the interpreter's lock, and none of it waits.
    writers: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, os.cpu_count(), "writer"))

    async def accept(self, body: GenerateRequest, *, request_id: str | None, follows: bool) -> Accepted:
        """Queue what `body` asks for. From here on the request has exactly one ending.

        Only a caller who `follows` its steps hears of them.

        Raises:
            NotReady, InvalidRequest, QueueFull
        """
        if not self.executor.ready:
            raise NotReady(f"The server is not ready ({self.executor.state}): try again soon.", retry_after=5)
        event_queue = EventQueue(follows=follows)
        take = partial(self.intake.request, body, event_queue.on_event, self.metrics.observe, request_id=request_id)
        if body.image is None:
            request = take()
        else:
            async with self.readers:
                request = await run_in_threadpool(take)
        return Accepted(request, event_queue, self.batcher.submit(request))

    async def write_files(self, completed: Completed, image_format: ImageFormat) -> Files:
        """Encode the pictures off the event loop."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self.writers, images.encode, image, image_format) for image in completed.images]
        contents = tuple([await job for job in jobs])
        seconds = time.perf_counter() - started
        self.metrics.stage("image", seconds)
        return Files(contents, seconds)
