"""The service behind every API: one way to accept requests, and one way to encode their images."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from server.access.allowances import Allowances
from server.api.body_limits import BodyLimits
from server.api.event_queue import EventQueue
from server.api.prompt_check import PromptCheck
from server.jobs.store import JobStore, MemoryStore
from server.requests.context import Caller, RequestContext
from server.requests.errors import ModelNotLoaded, NotReady
from server.requests.image_files import ImageFiles
from server.requests.images import ImageFormat
from server.requests.intake import Listener
from server.requests.prompt_log import log_prompts
from server.requests.request import Completed, Request
from server.requests.schemas import GenerateRequest
from server.runtime.degradation import Degradation, leaves_cache
from server.runtime.make import Runtime
from server.runtime.models import Model, Models

if TYPE_CHECKING:
    from server.runtime.monitoring.spans import Spans

_SOON = 5  # seconds
_POLL_SECONDS = 0.05  # between looks at a model that is loaded
_READERS = 2  # uploads that are decoded at once: each may take a second, and 250 MB of memory
_LORA_READERS = 8  # requests that look for their LoRAs at once, in threads that others need too


@dataclass(frozen=True, slots=True)
class Accepted:
    """A queued request, and the events its caller waits for."""

    request: Request
    event_queue: EventQueue
    position: int  # how many requests waited before it


@dataclass(frozen=True, slots=True)
class Files:
    """Encoded images, and the seconds that took."""

    contents: tuple[bytes, ...]
    seconds: float
    flagged: tuple[bool | None, ...]  # of each, whether the safety checker flagged it; None: not checked


@dataclass(frozen=True, slots=True)
class Service:
    """What the HTTP APIs call."""

    runtime: Runtime
    bodies: BodyLimits = field(default_factory=BodyLimits)
    image_files: ImageFiles = field(default_factory=ImageFiles)
    allowances: Allowances = field(default_factory=Allowances)
    log_prompts: bool = False
    spans: Spans | None = None
    prompt_check: PromptCheck | None = None
    readers: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, _READERS))
    lora_readers: asyncio.Semaphore = field(default_factory=partial(asyncio.Semaphore, _LORA_READERS))
    jobs: JobStore = field(default_factory=MemoryStore)
    degradation: Degradation | None = None  # what load does to the quality of images; None: nothing
    load_seconds: float | None = None  # requests load their model, and wait so long; None: administrators load models
    # No more of them than cores: most of their work is outside the interpreter's lock, and none of it waits.
    writers: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, os.cpu_count(), "writer"))

    @property
    def models(self) -> Models:
        """The models of the server, of which each request names one."""
        return self.runtime.models

    def check(self, caller: Caller) -> None:
        """Raise what `accept` would raise now for any body: to be asked before it is read.

        Raises:
            NotReady, RateLimited, QueueFull
        """
        executor = self.runtime.executor
        if not executor.ready:
            raise NotReady(f"The server is not ready ({executor.status}): try again soon.", retry_after=_SOON)
        self.allowances.check(caller)
        self.runtime.batcher.check(caller.name)

    async def accept(
        self,
        body: GenerateRequest,
        context: RequestContext,
        *,
        follows: bool,
        before_queued: Callable[[Request], Awaitable[None]] | None = None,
    ) -> Accepted:
        """Queue the request that `body` describes. From here on it has exactly one outcome.

        Only a caller that `follows` its steps receives events of them. `before_queued` is awaited before the request
        may take a step; it may raise.

        Raises:
            NotReady, UnknownModel, ModelNotLoaded, RateLimited, InvalidRequest, PromptRefused, QueueFull
        """
        self.check(context.caller)
        place = self.allowances.take(context.caller)
        try:
            own = () if place is None else (place.on_event,)
            return await self._queue(body, context, *own, follows=follows, before_queued=before_queued)
        except BaseException:
            if place is not None:
                place.give_back()
            raise

    async def _queue(
        self,
        body: GenerateRequest,
        context: RequestContext,
        *listeners: Listener,
        follows: bool,
        before_queued: Callable[[Request], Awaitable[None]] | None,
    ) -> Accepted:
        runtime = self.runtime
        queue = EventQueue(follows=follows)
        everyone: tuple[Listener, ...] = queue.on_event, runtime.metrics.observe, *listeners
        if self.spans:
            everyone = self.spans.observe, *everyone  # first: the span of the files follows the outcome
        model = self.models.find(body.model)
        if self.load_seconds is not None:
            await self._load(model, self.load_seconds)
        _check_loaded(model)
        make = partial(model.intake.request, body, *everyone, context=context)
        if not model.intake.reads_files(body):
            request = make()
        else:
            async with self.readers if body.image is not None else self.lora_readers:
                request = await run_in_threadpool(make)
        if self.prompt_check:
            await self.prompt_check(body.prompt, body.negative_prompt)
        request = self._under_load(request, body, model)
        if self.spans:
            self.spans.begin(request)
        if before_queued:
            await before_queued(request)
        position = runtime.batcher.submit(request)
        runtime.metrics.accepted(request)
        if self.log_prompts:
            log_prompts(request)
        return Accepted(request, queue, position)

    def _under_load(self, request: Request, body: GenerateRequest, model: Model) -> Request:
        """`request`; with its `cache` raised, where it would wait long and `body` leaves that to the server."""
        if self.degradation is None or not leaves_cache(body):
            return request
        before, wait = request.params.cache, self.runtime.batcher.wait_of(request)
        cache = self.degradation.position(before, wait=wait)
        raised = request if cache == before else model.intake.raise_cache(request, cache)
        return raised if raised.params.reuses_features else request

    async def _load(self, model: Model, seconds: float) -> None:
        """Have the model loaded, and wait for that. Raises ModelNotLoaded where it has no room."""
        if model.state in ("unloaded", "unloading"):
            self.models.load(model.name)
        until = time.monotonic() + seconds
        while model.state in ("unloading", "loading") and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)

    async def encode_images(
        self,
        request: Request,
        completed: Completed,
        image_format: ImageFormat,
        *,
        quality: int | None = None,
    ) -> Files:
        """Encode the images of `request` in worker threads, off the event loop; for `quality` see `images.encode`."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        make_file = partial(
            self.image_files.make,
            params=request.params,
            model=request.params.model,
            image_format=image_format,
            quality=quality,
        )
        jobs = [
            loop.run_in_executor(self.writers, make_file, image, seed)
            for image, seed in zip(completed.images, request.params.seeds, strict=True)
        ]
        contents = tuple([await job for job in jobs])
        seconds = time.perf_counter() - started
        self.runtime.metrics.stage("image", seconds)
        if self.spans:
            self.spans.image(request, seconds)
        return Files(contents, seconds, completed.flagged or (None,) * len(contents))


def _check_loaded(model: Model) -> None:
    """Raise ModelNotLoaded, with what to do, unless requests for the model are accepted: before files are decoded."""
    if model.state == "loading":
        raise ModelNotLoaded(f"The model {model.name} is loading: try again soon.", retry_after=_SOON)
    if model.state != "ready":
        why = f"failed to load ({model.reason})" if model.state == "failed" else "is not loaded"
        raise ModelNotLoaded(
            f"The model {model.name} {why}: choose another of GET /models, or have an administrator load it "
            f"(POST /v2/repository/models/{model.name}/load)."
        )
