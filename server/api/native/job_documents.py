"""The documents that describe jobs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import cast

from pydantic import BaseModel, Field

from server.api.native.documents import generated
from server.api.native.jobs import AnyJob, Jobs, as_job
from server.api.problems import problem
from server.jobs.job import Job, JobStatus
from server.requests.context import Priority
from server.requests.schemas import GenerateResponse, Parameters, Problem, Timings


class JobImage(BaseModel):
    """Where an image of a completed job is."""

    seed: int
    url: str


class JobDocument(BaseModel):
    """A job, as it is now."""

    id: str
    status: JobStatus = Field(description="failed, and cancelled, say why in error")
    position: int | None = Field(description="number of requests ahead in the queue; null when it does not wait there")
    estimate_s: float | None = Field(description="seconds until it is likely to start; null where that is not known")
    step: int = Field(description="denoising steps that are done")
    steps: int
    created: datetime
    started: datetime | None
    finished: datetime | None
    expires: datetime | None = Field(description="when a job that has ended is removed, if not before")
    deadline: datetime | None = Field(description="when the job ends with 504 where it is not complete")
    priority: Priority
    model: str
    parameters: Parameters
    warnings: list[str]
    timings: Timings | None
    error: Problem | None
    images: list[JobImage]


class JobList(BaseModel):
    """The latest jobs, the latest first."""

    jobs: list[JobDocument]


def describe(jobs: Jobs, found: AnyJob, *, root_path: str) -> JobDocument:
    job = as_job(found)
    facts = job.facts
    finished, error, queued = facts.finished, facts.error, jobs.queued(found)
    return JobDocument(
        id=job.id,
        position=queued.position if queued else None,
        estimate_s=queued.estimate_s if queued else None,
        expires=finished and finished + timedelta(seconds=jobs.limits.seconds),
        error=error and problem(error.restore()),
        images=_images(job, root_path) if facts.status == "completed" else [],
        **{name: getattr(facts, name) for name in _SAME},
    )


def url_of(job_id: str, root_path: str) -> str:
    return f"{root_path}/jobs/{job_id}"


def response_of(jobs: Jobs, job: Job, files: Sequence[bytes]) -> GenerateResponse:
    """The answer to the request of a completed job, whose images are `files` (PNG)."""
    facts = job.facts
    timings = cast(Timings, facts.timings)  # of every job that is completed
    contents = [jobs.transcode(file, facts.image_format) for file in files]
    return GenerateResponse(
        id=job.id,
        model=facts.model,
        images=generated(job.seeds, contents, facts.image_format, job.flagged),
        parameters=facts.parameters,
        timings=timings,
        warnings=facts.warnings,
    )


def _images(job: Job, root_path: str) -> list[JobImage]:
    url = url_of(job.id, root_path)
    return [JobImage(seed=seed, url=f"{url}/images/{index}") for index, seed in enumerate(job.seeds)]


_SAME = (
    "status",
    "step",
    "steps",
    "created",
    "started",
    "finished",
    "deadline",
    "priority",
    "model",
    "parameters",
    "warnings",
    "timings",
)
