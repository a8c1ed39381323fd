"""The jobs of callers: who may see which, and which requests are the same one."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from weakref import WeakValueDictionary

from server.api.native.job_runner import JobRunner
from server.api.native.live_job import LiveJob
from server.api.native.updates import queued_now
from server.api.service import Service
from server.jobs.job import Job, Key
from server.requests.context import RequestContext
from server.requests.errors import Cancelled, FieldError, Forbidden, InvalidRequest, NotFound
from server.requests.request import Failed
from server.requests.schemas import GenerateRequest, QueuedEvent

_LISTED = 100
_HEADER = "Idempotency-Key"

AnyJob = LiveJob | Job


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks about a job."""

    owner: str | None  # of the API key; None without one
    is_admin: bool = False

    def may_see(self, job: Job) -> bool:
        """Whether it is theirs. Without a key its id is enough: addresses change, and many callers may share one."""
        return self.is_admin or job.owner in (None, self.owner)


class Jobs:
    """The jobs of a server, as callers see them. For the event loop alone."""

    def __init__(self, service: Service) -> None:
        self.runner = JobRunner(service)
        self.limits = service.jobs.limits
        self.transcode = service.image_files.transcode
        self._store = service.jobs
        self._batcher = service.runtime.batcher
        self._calls = self.runner.calls
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def accept(
        self, body: GenerateRequest, context: RequestContext, *, owner: str | None, key: str | None
    ) -> AnyJob:
        """Queue and store a job, or find the one that the caller's `Idempotency-Key` stands for.

        Raises:
            NotReady, InvalidRequest, QueueFull, StorageFailed
        """
        if key is None:
            return await self.runner.create(body, context, owner=owner, key=None)
        named = Key(context.caller.name, key, await asyncio.to_thread(_fingerprint, body))
        lock = self._locks.setdefault((named.caller, named.name), asyncio.Lock())
        async with lock:  # so that of two that come together one finds the other
            known = await self._calls(self._store.find, named.caller, named.name)
            if known is None:
                return await self.runner.create(body, context, owner=owner, key=named)
        if known.key != named:
            message = f"{_HEADER}: it was sent before with another body: choose a new key for each request."
            raise InvalidRequest(message, fields=(FieldError(_HEADER, message),))
        return self.runner.live.get(known.id, known)

    async def get(self, job_id: str, viewer: Viewer) -> AnyJob:
        """Raises NotFound, StorageFailed."""
        found: AnyJob | None = self.runner.live.get(job_id)
        found = found or await self._calls(self._store.get, job_id)
        if found is None or not viewer.may_see(as_job(found)):
            raise NotFound(self._not_found)
        return found

    async def latest(self, viewer: Viewer) -> list[AnyJob]:
        """The latest jobs of the viewer, of everyone for an admin. Raises Forbidden, StorageFailed."""
        if viewer.owner is None and not viewer.is_admin:
            raise Forbidden("Without an API key there is no list of jobs: ask for each job by its id.")
        owner = None if viewer.is_admin else viewer.owner
        jobs = await self._calls(self._store.list, owner, _LISTED)
        return [self.runner.live.get(job.id, job) for job in jobs]

    async def image(self, found: AnyJob, index: int) -> bytes:
        """The file (PNG) of an image of a completed job. Raises NotFound, StorageFailed."""
        if isinstance(found, LiveJob) and index < len(found.images):
            return found.images[index]
        content = await self._calls(self._store.image, as_job(found).id, index)
        if content is None:
            raise NotFound(f"There is no image {index} of this job, or no longer.")
        return content

    async def remove(self, found: AnyJob) -> None:
        """Cancel a job that waits or runs, which ends at its next step; remove one that has ended."""
        if isinstance(found, LiveJob) and not found.ended.done():
            if not found.cancel():
                await self.runner.end(found, Failed(Cancelled("The job was cancelled before it was run again.")))
            return
        self.runner.live.pop(as_job(found).id, None)
        await self._calls(self._store.remove, as_job(found).id)

    def queued(self, found: AnyJob) -> QueuedEvent | None:
        """The position of a job that waits in the queue."""
        if not isinstance(found, LiveJob) or found.accepted is None:
            return None
        return queued_now(self._batcher, found.accepted.request, name=found.id)

    @property
    def _not_found(self) -> str:
        end = "or earlier if many end" if self._store.persistent else "and all of them when the server stops"
        return f"This caller has no such job: jobs are removed {self.limits.seconds:g} seconds after their end, {end}."


def as_job(found: AnyJob) -> Job:
    """The job as it is now."""
    return found.job if isinstance(found, LiveJob) else found


def _fingerprint(body: GenerateRequest) -> str:
    """A digest of every field."""
    digest = hashlib.sha256(body.model_dump_json(exclude_defaults=True, exclude={"image", "mask"}).encode())
    for file in (body.image, body.mask):
        digest.update(b"-" if file is None else hashlib.sha256(file).digest())
    return digest.hexdigest()
