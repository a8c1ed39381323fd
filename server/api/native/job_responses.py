"""Answers to requests that are jobs: at once, when they have ended, or as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from server.api.error_responses import error_response
from server.api.native import documents
from server.api.native.job_documents import describe, response_of, url_of
from server.api.native.jobs import AnyJob, Jobs, as_job
from server.api.native.live_job import LiveJob
from server.api.native.negotiation import ResponseFormat
from server.api.native.updates import updates
from server.api.problems import problem
from server.api.streaming import STREAM_HEADERS
from server.jobs.job import Job
from server.requests.errors import Cancelled, ServerError
from server.requests.images import ImageFormat
from server.requests.request import Outcome, Started, Stepped
from server.requests.schemas import GenerateResponse, QueuedEvent


async def respond(jobs: Jobs, found: AnyJob, http: HttpRequest, *, wanted: ResponseFormat, wait: bool) -> Response:
    """Answer `POST /generate` with a job: its document, or if its caller waits, its images."""
    if not wait:
        return accepted(jobs, found, http)
    if wanted == "events":
        return stream(jobs, found)
    job = await _end_of(found, http)
    if error := job.facts.why_not:
        return error_response(http, error)
    if wanted == "json":
        return await _json(jobs, found, job)
    return await image(jobs, found, 0, wanted)


def accepted(jobs: Jobs, found: AnyJob, http: HttpRequest) -> Response:
    root = http.scope.get("root_path", "")
    document = describe(jobs, found, root_path=root)
    headers = _headers(as_job(found)) | {"Location": url_of(document.id, root)}
    return Response(document.model_dump_json(), 202, headers, media_type="application/json")


async def image(jobs: Jobs, found: AnyJob, index: int, image_format: ImageFormat) -> Response:
    """An image of a completed job. Raises NotFound, StorageFailed."""
    job = as_job(found)
    content = await jobs.image(found, index)
    if image_format != "png":
        content = await run_in_threadpool(jobs.transcode, content, image_format)
    headers = _headers(job) | documents.image_headers(job.seeds[index], job.facts.warnings, job.flagged[index])
    return Response(content, headers=headers, media_type=f"image/{image_format}")


def stream(jobs: Jobs, found: AnyJob) -> StreamingResponse:
    """The events of a job from its present state on."""
    headers = {**STREAM_HEADERS, **_headers(as_job(found))}
    return StreamingResponse(_events(jobs, found), media_type="text/event-stream", headers=headers)


def _headers(job: Job) -> dict[str, str]:
    timings = job.facts.timings
    timing = {"Server-Timing": documents.server_timing(timings)} if timings else {}
    return {"X-Request-Id": job.facts.request_id, "X-Job-Id": job.id, **timing}


async def _json(jobs: Jobs, found: AnyJob, job: Job) -> Response:
    document = await _document(jobs, found, job)
    return Response(document.model_dump_json(), headers=_headers(job), media_type="application/json")


async def _document(jobs: Jobs, found: AnyJob, job: Job) -> GenerateResponse:
    files = [await jobs.image(found, index) for index in range(len(job.seeds))]
    return await run_in_threadpool(response_of, jobs, job, files)


async def _end_of(found: AnyJob, http: HttpRequest) -> Job:
    """The job once it has ended. Raises Cancelled: its caller disconnected, which does not concern the job."""
    if not isinstance(found, LiveJob):
        return found
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((found.ended, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not found.ended.done():
        raise Cancelled("The caller disconnected; the job goes on.")
    return found.ended.result()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(jobs: Jobs, found: AnyJob) -> AsyncIterator[bytes]:
    if isinstance(found, LiveJob) and not found.ended.done():
        with found.following() as queue:
            position = partial(jobs.queued, found)
            async for update in updates(queue, _present(jobs, found), position):
                if not isinstance(update, Outcome):
                    yield await documents.progress_event(found.id, update)
    job = as_job(found)
    if error := job.facts.why_not:
        yield documents.event("error", problem(error))
        return
    try:
        yield documents.event("completed", await _document(jobs, found, job))
    except ServerError as gone:  # it was removed meanwhile
        yield documents.event("error", problem(gone))


def _present(jobs: Jobs, live: LiveJob) -> QueuedEvent | Started | Stepped:
    """How far the job is."""
    if live.step:
        return Stepped(live.step, live.job.facts.steps)
    return Started() if live.started else jobs.queued(live) or QueuedEvent(id=live.id, position=0)
