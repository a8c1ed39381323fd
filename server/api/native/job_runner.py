"""Runs jobs: queues them, stores how they end, and runs those of an earlier process again."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from http import HTTPStatus

from server.api.native.documents import timings_of
from server.api.native.live_job import LiveJob
from server.api.service import Accepted, Service
from server.jobs.calls import StoreCalls
from server.jobs.job import Facts, Job, Key, Recipe, now
from server.requests.context import Caller, RequestContext
from server.requests.errors import (
    STATUS,
    DeadlineExceeded,
    InternalError,
    ModelNotLoaded,
    NotReady,
    ServerError,
    ServerStopping,
    StorageFailed,
)
from server.requests.request import Failed, Outcome, Request
from server.requests.schemas import GenerateRequest

_log = logging.getLogger(__name__)
_MOST_STARTS = 3  # of a job, each of which ended with the process
_SWEEP_SECONDS = 30.0  # at most between two looks for what has expired
_POLL_SECONDS = 0.2  # while the engines are loaded, or the queue is full


class JobRunner:
    """Runs the jobs of a server. For the event loop alone."""

    def __init__(self, service: Service) -> None:
        self.calls = StoreCalls(service.jobs)
        self.live: dict[str, LiveJob] = {}  # until their end is stored
        self._service = service
        self._store = service.jobs
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run until the executor has ended: then the jobs have ended, or stay for the next process."""
        earlier = [LiveJob(job) for job in await self.calls(self._store.unfinished)]
        self.live |= {live.id: live for live in earlier}
        if earlier:
            self._spawn(self._run_earlier(earlier))
        sweeper = asyncio.ensure_future(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
            await self.calls.close()

    def stop(self) -> None:
        """No caller is connected any more: only a job whose result will be stored still takes steps."""
        for live in self.live.values():
            if not (self._store.persistent and live.started):
                live.cancel(ServerStopping("The server stopped before this job was done: send it again."))

    async def create(
        self, body: GenerateRequest, context: RequestContext, *, owner: str | None, key: Key | None
    ) -> LiveJob:
        """Store and queue a job. Raises what `Service.accept` does, and StorageFailed."""
        job_id = secrets.token_hex(16)
        context = replace(context, request_id=context.request_id or job_id)
        stored: list[LiveJob] = []

        async def store(request: Request) -> None:
            params = request.params
            facts = Facts.of(request, body, model=params.model, deadline=_deadline(request))
            job = Job(job_id, owner, facts, key)
            chosen = {"seed": params.seeds[0], "model": params.model, "cache": params.cache}
            same = body.model_copy(update=chosen)
            await self.calls(self._store.add, job, Recipe(same, context.caller.name, context.api))
            stored.append(LiveJob(job))

        try:
            accepted = await self._service.accept(body, context, follows=True, before_queued=store)
        except ServerError:
            if stored:  # meanwhile the queue was filled
                await self.calls(self._store.remove, job_id)
            raise
        (live,) = stored
        self.live[job_id] = live
        live.accepted = accepted
        self._spawn(self._follow(live, accepted))
        return live

    async def end(self, live: LiveJob, outcome: Outcome) -> None:
        """Store how the job ended, then let it be seen. A job of a process that stops may stay for the next one."""
        facts, images = await self._result(live, outcome)
        job = live.job.with_facts(facts)
        if self._store.persistent and _ends_with_the_process(outcome):
            await self._leave(live, outcome)
        else:
            await self._store_end(live.id, facts, images)
        live.end(job, images)

    async def _follow(self, live: LiveJob, accepted: Accepted) -> None:
        outcome = await live.follow(accepted, lambda: self._spawn(self._count_start(live.id)))
        await self.end(live, outcome)

    async def _count_start(self, job_id: str, count: int = 1) -> None:
        try:
            await self.calls(self._store.start, job_id, count)
        except StorageFailed as error:
            _log.error("%s", error)

    async def _leave(self, live: LiveJob, outcome: Outcome) -> None:
        """Leave the job to the next process; what was cancelled in order does not count as a start."""
        self.live.pop(live.id, None)  # its end is not to be stored
        if live.started and isinstance(outcome, Failed) and isinstance(outcome.error, ServerStopping):
            await self._count_start(live.id, -1)

    async def _result(self, live: LiveJob, outcome: Outcome) -> tuple[Facts, tuple[bytes, ...]]:
        facts = live.job.facts
        if isinstance(outcome, Failed) or live.accepted is None:
            error = outcome.error if isinstance(outcome, Failed) else _unexpected()
            return facts.failed(error, started=live.started, step=live.step), ()
        try:
            files = await self._service.encode_images(live.accepted.request, outcome, "png")
        except Exception:  # whatever it is, the job must end
            _log.exception("the images of job %s cannot be encoded", live.id)
            return facts.failed(_unexpected(), started=live.started, step=live.step), ()
        return facts.completed(timings_of(live.accepted.request, files), live.started, files.flagged), files.contents

    async def _store_end(self, job_id: str, facts: Facts, images: Sequence[bytes]) -> None:
        try:
            await self.calls(self._store.finish, job_id, facts, images)
        except StorageFailed as error:
            _log.error("the end of job %s is in memory until it can be stored: %s", job_id, error)
        else:
            self.live.pop(job_id, None)

    async def _run_earlier(self, earlier: Sequence[LiveJob]) -> None:
        """Queue the jobs that an earlier process has left, in the order in which they came."""
        executor = self._service.runtime.executor
        while not executor.ready:
            if not executor.alive:
                return
            await asyncio.sleep(_POLL_SECONDS)
        _log.info("%d jobs of an earlier process are run again", len(earlier))
        for live in earlier:
            if not live.ended.done():  # cancelled meanwhile
                await self._run_again(live)

    async def _run_again(self, live: LiveJob) -> None:
        try:
            accepted = await self._queue_again(live)
        except ServerError as error:
            await self.end(live, Failed(error))
        else:
            live.accepted = accepted
            self._spawn(self._follow(live, accepted))

    async def _queue_again(self, live: LiveJob) -> Accepted:
        """Raises ServerError: the job has ended with it, or with NotReady the server stops."""
        found = await self.calls(self._store.recipe, live.id)
        if found is None:
            raise _unexpected()
        recipe, starts = found
        if starts >= _MOST_STARTS:
            raise InternalError(f"The server ended {starts} times while it ran this job, which is not run again.")
        while True:
            context = _context_of(live.job, recipe)
            try:
                return await self._service.accept(recipe.body, context, follows=True)
            except ServerError as error:
                is_loading = isinstance(error, ModelNotLoaded) and error.retry_after is not None
                if STATUS[type(error)] != HTTPStatus.TOO_MANY_REQUESTS and not is_loading:
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self._store.limits.seconds, _SWEEP_SECONDS))
            for live in [live for live in self.live.values() if live.ended.done()]:
                await self._store_end(live.id, live.job.facts, live.images)
            try:
                await self.calls(self._store.expire)
            except StorageFailed as error:
                _log.error("%s", error)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ends_with_the_process(outcome: Outcome) -> bool:
    error = outcome.error if isinstance(outcome, Failed) else None
    return isinstance(error, ServerStopping | NotReady) and not isinstance(error, ModelNotLoaded)


def _deadline(request: Request) -> datetime | None:
    if request.deadline is None:
        return None
    return now() + timedelta(seconds=request.deadline - time.perf_counter())


def _context_of(job: Job, recipe: Recipe) -> RequestContext:
    """Raises DeadlineExceeded."""
    facts = job.facts
    left = (facts.deadline - now()).total_seconds() if facts.deadline else None
    if left is not None and left <= 0:
        raise DeadlineExceeded("The time limit of this request passed while the server was stopped.")
    return RequestContext(Caller(recipe.caller), recipe.api, request_id=facts.request_id, timeout=left)


def _unexpected() -> ServerError:
    return InternalError("Unexpected server error; see the server log.")
