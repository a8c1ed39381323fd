"""`/jobs`: the state of jobs, their images and events, and how they are cancelled."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import APIRouter, Path, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import WithJsonSchema

from server.api import openapi
from server.api.context import caller_of, owner_of
from server.api.error_responses import error_response
from server.api.native import job_responses
from server.api.native.job_documents import JobDocument, JobList, describe
from server.api.native.jobs import AnyJob, Jobs, Viewer, as_job
from server.api.native.negotiation import negotiate
from server.requests import images
from server.requests.errors import NotDone, NotFound
from server.requests.images import ImageFormat

# Text, whatever it is: what is no id, or no number, is not found.
JobId = Annotated[str, Path(description="id of the job", json_schema_extra={"pattern": "^[0-9a-f]{32}$"})]
Index = Annotated[
    str, Path(description="number of the image, from 0"), WithJsonSchema({"type": "integer", "minimum": 0})
]
_FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image, in the format that `Accept` selects.",
        "content": {f"image/{kind}": openapi.IMAGE for kind in images.FORMATS},
    }
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Its events from its present state on, as of `POST /generate`.",
        "content": {"text/event-stream": openapi.EVENTS},
    }
}


def routes(jobs: Jobs) -> APIRouter:
    router = APIRouter(tags=[openapi.JOBS])
    unknown = openapi.problems(404, 503)
    no_image = openapi.problems(404, 406, 409, 500, 503, 504)

    @router.get(
        "/jobs", operation_id="jobs", summary="List the jobs of an API key", responses=openapi.problems(403, 503)
    )
    async def list_jobs(http: HttpRequest) -> JobList:
        found = await jobs.latest(_viewer(http))
        return JobList(jobs=[_describe(jobs, job, http) for job in found])

    @router.get("/jobs/{job_id}", operation_id="job", summary="The state of a job", responses=unknown)
    async def get_job(job_id: JobId, http: HttpRequest) -> JobDocument:
        return _describe(jobs, await jobs.get(job_id, _viewer(http)), http)

    @router.delete(
        "/jobs/{job_id}",
        operation_id="cancel",
        summary="Cancel a job, or remove one that has ended",
        status_code=202,
        responses={
            202: {"description": "The job is cancelled, and ends before its next step."},
            204: {"description": "The job had ended, and is removed."},
            **unknown,
        },
        response_model=JobDocument,
    )
    async def cancel_job(job_id: JobId, http: HttpRequest) -> Response:
        found = await jobs.get(job_id, _viewer(http))
        await jobs.remove(found)
        if as_job(found).facts.finished:
            return Response(status_code=204)
        return job_responses.accepted(jobs, found, http)

    @router.get(
        "/jobs/{job_id}/image",
        operation_id="job_image",
        summary="The first image of a completed job",
        response_class=Response,
        responses={**_FILES, **no_image},
    )
    async def get_image(job_id: JobId, http: HttpRequest) -> Response:
        return await _image(jobs, job_id, 0, http)

    @router.get(
        "/jobs/{job_id}/images/{index}",
        operation_id="job_images",
        summary="An image of a completed job",
        response_class=Response,
        responses={**_FILES, **no_image},
    )
    async def get_images(job_id: JobId, index: Index, http: HttpRequest) -> Response:
        if not index.isdecimal():
            raise NotFound("The number of an image is 0 or more.")
        return await _image(jobs, job_id, int(index), http)

    @router.get(
        "/jobs/{job_id}/events",
        operation_id="job_events",
        summary="The events of a job, from its present state on",
        response_class=StreamingResponse,
        responses={**_STREAM, **unknown},
    )
    async def get_events(job_id: JobId, http: HttpRequest) -> Response:
        return job_responses.stream(jobs, await jobs.get(job_id, _viewer(http)))

    return router


def _viewer(http: HttpRequest) -> Viewer:
    return Viewer(owner_of(http), caller_of(http).is_admin)


def _describe(jobs: Jobs, found: AnyJob, http: HttpRequest) -> JobDocument:
    return describe(jobs, found, root_path=http.scope.get("root_path", ""))


async def _image(jobs: Jobs, job_id: str, index: int, http: HttpRequest) -> Response:
    wanted = negotiate(http.headers.getlist("accept"), images.FORMATS)
    found = await jobs.get(job_id, _viewer(http))
    facts = as_job(found).facts
    if facts.status in ("queued", "running"):
        raise NotDone(f"The job is {facts.status}, {facts.step} of {facts.steps} steps are done: ask again later.")
    if error := facts.why_not:
        return error_response(http, error)
    return await job_responses.image(jobs, found, index, cast(ImageFormat, wanted))
