"""Where jobs are stored: what every store does, and the one in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.jobs.job import Facts, Job, Recipe

OVERHEAD = 1024  # bytes that a job counts as beyond its images


@dataclass(frozen=True, slots=True)
class Limits:
    """How long jobs that have ended are kept, and how many; beyond it, those that ended first are removed."""

    seconds: float = 3600
    size: int = 512 * 2**20  # bytes of all images
    jobs: int = 10_000
    clock: Callable[[], float] = field(default=time.time, repr=False)  # seconds since 1970


@dataclass(slots=True)
class Counts:
    """What a store holds, and what it has removed. For any thread to read."""

    jobs: int = 0
    size: int = 0  # bytes
    evicted: int = 0
    expired: int = 0


class JobStore(Protocol):
    """Stores jobs until they are removed, expire or are evicted. Jobs that have not ended are never evicted.

    One thread calls it. Methods that are given the id of a job that is gone do nothing, or return nothing.
    """

    limits: Limits
    counts: Counts
    persistent: bool  # outlives the process, and may block: to be called in a thread of its own

    def add(self, job: Job, recipe: Recipe) -> None:
        """Store a job that is about to be queued. Raises StorageFailed."""

    def start(self, job_id: str, count: int = 1) -> None:
        """Count that the job has been started, or with -1 that this does not count. Raises StorageFailed."""

    def finish(self, job_id: str, facts: Facts, images: Sequence[bytes] = ()) -> None:
        """Store the end of a job with its images (PNG). Raises StorageFailed."""

    def get(self, job_id: str) -> Job | None: ...

    def find(self, caller: str, key: str) -> Job | None:
        """The job that `caller` sent with this `Idempotency-Key`."""

    def list(self, owner: str | None, limit: int) -> list[Job]:
        """The latest jobs of `owner`, or of everyone where that is None; the latest first."""

    def image(self, job_id: str, index: int) -> bytes | None: ...

    def remove(self, job_id: str) -> None:
        """Raises StorageFailed."""

    def expire(self) -> None:
        """Remove jobs that ended too long ago. Raises StorageFailed."""

    def unfinished(self) -> Sequence[Job]:
        """The jobs that have not ended, in the order in which they came: those of an earlier process."""

    def recipe(self, job_id: str) -> tuple[Recipe, int] | None:
        """What to run the job again from, and how often it was started. Raises InvalidRequest."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Kept:
    job: Job
    images: tuple[bytes, ...] = ()
    ended: float | None = None  # seconds since 1970

    @property
    def size(self) -> int:
        return OVERHEAD + sum(map(len, self.images))


class MemoryStore:
    """Jobs in the memory of this process, which end with it."""

    persistent = False

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.counts = Counts()
        self._kept: dict[str, _Kept] = {}  # in the order in which they came
        self._ended: dict[str, None] = {}  # ids in the order in which they ended
        self._keys: dict[tuple[str, str], str] = {}  # ids by caller and key

    def add(self, job: Job, recipe: Recipe) -> None:  # noqa: ARG002 - there is nothing to run it again
        kept = self._kept[job.id] = _Kept(job)
        if job.key:
            self._keys[job.key.caller, job.key.name] = job.id
        self.counts.jobs += 1
        self.counts.size += kept.size
        self._evict()

    def start(self, job_id: str, count: int = 1) -> None:
        """Nothing: a job that ends the process is not run again."""

    def finish(self, job_id: str, facts: Facts, images: Sequence[bytes] = ()) -> None:
        kept = self._kept.get(job_id)
        if kept is None or kept.ended is not None:
            return
        self.counts.size -= kept.size
        kept.job = kept.job.with_facts(facts)
        kept.images = tuple(images)
        kept.ended = self.limits.clock()
        self.counts.size += kept.size
        self._ended[job_id] = None
        self._evict()

    def get(self, job_id: str) -> Job | None:
        kept = self._current(job_id)
        return kept.job if kept else None

    def find(self, caller: str, key: str) -> Job | None:
        return self.get(self._keys.get((caller, key), ""))

    def list(self, owner: str | None, limit: int) -> list[Job]:
        self.expire()
        jobs = [kept.job for kept in reversed(self._kept.values())]
        return [job for job in jobs if owner in (None, job.owner)][:limit]

    def image(self, job_id: str, index: int) -> bytes | None:
        kept = self._current(job_id)
        return kept.images[index] if kept and index < len(kept.images) else None

    def remove(self, job_id: str) -> None:
        kept = self._kept.pop(job_id, None)
        if kept is None:
            return
        self._ended.pop(job_id, None)
        if kept.job.key:
            self._keys.pop((kept.job.key.caller, kept.job.key.name), None)
        self.counts.jobs -= 1
        self.counts.size -= kept.size

    def expire(self) -> None:
        while self._ended and self._is_old(self._kept[oldest := next(iter(self._ended))]):
            self.remove(oldest)
            self.counts.expired += 1

    def unfinished(self) -> Sequence[Job]:
        return ()

    def recipe(self, job_id: str) -> tuple[Recipe, int] | None:  # noqa: ARG002 - it has none
        return None

    def close(self) -> None:
        """Nothing: the process ends."""

    def _current(self, job_id: str) -> _Kept | None:
        kept = self._kept.get(job_id)
        return None if kept is None or self._is_old(kept) else kept

    def _is_old(self, kept: _Kept) -> bool:
        return kept.ended is not None and self.limits.clock() >= kept.ended + self.limits.seconds

    def _evict(self) -> None:
        """Remove the oldest, but not the one that ended last."""
        while len(self._ended) > 1 and (self.counts.size > self.limits.size or self.counts.jobs > self.limits.jobs):
            self.remove(next(iter(self._ended)))
            self.counts.evicted += 1
