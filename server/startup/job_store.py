"""The store of jobs that the settings ask for."""

from __future__ import annotations

from engines.errors import EngineError
from server.jobs.store import JobStore, Limits, MemoryStore
from server.runtime.monitoring.metrics import Metrics
from server.startup.settings import ServerSettings


def open_job_store(settings: ServerSettings, metrics: Metrics) -> JobStore:
    """Open the store, and show in `metrics` what it holds. Raises EngineError."""
    store = _open(settings)
    counts = store.counts
    metrics.add_gauge("latentd_jobs", "Jobs that are stored.", lambda: counts.jobs)
    metrics.add_gauge("latentd_jobs_bytes", "Size of the images of jobs.", lambda: counts.size)
    metrics.add_counter("latentd_jobs_evicted", "Jobs removed because of their number or size.", lambda: counts.evicted)
    metrics.add_counter("latentd_jobs_expired", "Jobs removed after their time to live.", lambda: counts.expired)
    return store


def _open(settings: ServerSettings) -> JobStore:
    limits = Limits(seconds=settings.job_ttl, size=settings.max_job_storage * 2**20)
    if settings.jobs_database is None:
        return MemoryStore(limits)
    try:
        from server.jobs.database import Database  # noqa: PLC0415 - an optional package, and half a second
    except ImportError as error:
        raise EngineError(f"--jobs-database needs SQLAlchemy: install the extra `jobs` ({error}).") from error
    return Database(settings.jobs_database, limits)
