"""`POST /generate`: JSON, an image file, or server-sent events, negotiated by `Accept`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import cast

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from server.api import openapi
from server.api.bodies import describe_body, read_either
from server.api.context import context_of, owner_of
from server.api.error_responses import error_response
from server.api.native import documents, huggingface, job_responses
from server.api.native.documents import response_of, server_timing, timings_of
from server.api.native.huggingface import HuggingFaceBody
from server.api.native.job_documents import JobDocument
from server.api.native.job_options import JobOptions
from server.api.native.jobs import Jobs
from server.api.native.negotiation import ResponseFormat, negotiate
from server.api.native.updates import Update, queued_event, queued_now, updates
from server.api.outcomes import wait_for_outcome
from server.api.problems import problem
from server.api.routes import RawRoute
from server.api.service import Accepted, Service
from server.api.streaming import STREAM_HEADERS
from server.requests import images
from server.requests.errors import FieldError, InvalidRequest
from server.requests.images import ImageFormat
from server.requests.request import Completed, Failed, Request
from server.requests.schemas import GenerateRequest, GenerateResponse


def routes(service: Service, jobs: Jobs) -> APIRouter:
    router = APIRouter(route_class=RawRoute)

    @router.post(
        "/generate",
        operation_id="generate",
        tags=[openapi.GENERATION],
        summary="Generate images from a prompt",
        response_model=GenerateResponse,
        responses={
            200: {
                "description": "The images, in the format that `Accept` selects: JSON, one image file, or server-sent "
                "events (`queued`, `started`, `step`, then `completed` or `error`).",
                "content": {
                    **{f"image/{kind}": openapi.IMAGE for kind in images.FORMATS},
                    "text/event-stream": openapi.EVENTS,
                },
            },
            202: {"description": "With `wait=false`: the job.", "model": JobDocument, "headers": openapi.JOB_HEADERS},
            **huggingface.describe_errors(openapi.problems()),
        },
        openapi_extra=openapi.generate_extra(huggingface.describe_body(describe_body(GenerateRequest))),
    )
    async def generate(http: HttpRequest) -> Response:
        wanted = negotiate(http.headers.getlist("accept"))
        options = JobOptions.of(http)
        context = context_of(http, "generate" if options.wait else "jobs")
        if options.key is None:  # with a key it may be known already, and need no place
            service.check(context.caller)
        with service.bodies.lease() as lease:  # until the files are decoded to pixels
            body = await read_either(http, GenerateRequest, HuggingFaceBody, lease)
            if isinstance(body, HuggingFaceBody):
                body = await huggingface.native(http, body, lease)
                context = replace(context, api="huggingface")
                wanted = huggingface.image_format(wanted, body)
            if options.wait:
                _check_count(body, wanted)
            image_format = body.image_format
            if options.needs_job:
                job = await jobs.accept(body, context, owner=owner_of(http), key=options.key)
            else:
                accepted = await service.accept(body, context, follows=wanted == "events")
            del body  # free the uploaded files, which may be megabytes, before the wait
        if options.needs_job:
            return await job_responses.respond(jobs, job, http, wanted=wanted, wait=options.wait)
        if wanted == "events":
            return _stream(service, accepted, image_format)
        return await _respond(service, accepted, http, wanted=wanted, image_format=image_format)

    return router


def _check_count(body: GenerateRequest, wanted: ResponseFormat) -> None:
    if wanted in images.FORMATS and body.num_images > 1:
        message = "An image file holds one image: set num_images to 1, or accept application/json."
        raise InvalidRequest(message, fields=(FieldError("num_images", message),))


async def _respond(
    service: Service, accepted: Accepted, http: HttpRequest, *, wanted: ResponseFormat, image_format: ImageFormat
) -> Response:
    """Wait for the images, and send them."""
    request = accepted.request
    outcome = await wait_for_outcome(accepted, http)
    if isinstance(outcome, Failed):
        return error_response(http, outcome.error)
    bare = wanted in images.FORMATS
    files = await service.encode_images(request, outcome, cast(ImageFormat, wanted) if bare else image_format)
    headers = {"X-Request-Id": request.id, "Server-Timing": server_timing(timings_of(request, files))}
    if bare:
        headers |= documents.image_headers(request.params.seeds[0], request.params.warnings, files.flagged[0])
        return Response(files.contents[0], headers=headers, media_type=f"image/{wanted}")
    document = response_of(request, files, image_format=image_format)
    return Response(document.model_dump_json(), headers=headers, media_type="application/json")


def _stream(service: Service, accepted: Accepted, image_format: ImageFormat) -> StreamingResponse:
    return StreamingResponse(
        _sse(service, accepted, image_format),
        media_type="text/event-stream",
        headers={**STREAM_HEADERS, "X-Request-Id": accepted.request.id},
    )


async def _sse(service: Service, accepted: Accepted, image_format: ImageFormat) -> AsyncIterator[bytes]:
    request, batcher = accepted.request, service.runtime.batcher
    first = queued_event(batcher, request, name=request.id, position=accepted.position)
    position = partial(queued_now, batcher, request, name=request.id)
    try:
        async for update in updates(accepted.event_queue, first, position):
            yield await _describe(service, request, update, image_format)
    finally:
        request.cancel()  # the caller closed the stream; without effect on a request that has ended


async def _describe(service: Service, request: Request, update: Update, image_format: ImageFormat) -> bytes:
    match update:
        case Completed():
            files = await service.encode_images(request, update, image_format)
            return documents.event("completed", response_of(request, files, image_format=image_format))
        case Failed(error):
            return documents.event("error", problem(error))
        case _:
            return await documents.progress_event(request.id, update)
