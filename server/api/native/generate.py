"""`POST /generate`: JSON, an image file, or server-sent events, negotiated by `Accept`."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from server.api import openapi
from server.api.bodies import describe_body, read_either
from server.api.context import context_of
from server.api.error_responses import error_response
from server.api.native import huggingface
from server.api.native.huggingface import HuggingFaceBody
from server.api.native.negotiation import ResponseFormat, negotiate
from server.api.outcomes import wait_for_outcome
from server.api.problems import problem
from server.api.routes import RawRoute
from server.api.service import Accepted, Files, Service
from server.requests import images
from server.requests.errors import FieldError, InvalidRequest
from server.requests.images import ImageFormat
from server.requests.request import Completed, Event, Failed, Image, Request, Started, Stepped
from server.requests.schemas import (
    GeneratedImage,
    GenerateRequest,
    GenerateResponse,
    Parameters,
    QueuedEvent,
    StartedEvent,
    StepEvent,
    Timings,
)

KEEPALIVE_SECONDS = 15.0
_POLL_SECONDS = 1.0  # between looks at the position in the queue


def routes(service: Service) -> APIRouter:
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
            **huggingface.describe_errors(openapi.problems()),
        },
        openapi_extra=openapi.generate_extra(huggingface.describe_body(describe_body(GenerateRequest))),
    )
    async def generate(http: HttpRequest) -> Response:
        wanted = negotiate(http.headers.getlist("accept"))
        context = context_of(http, "generate")
        service.check(context.caller)
        with service.bodies.lease() as lease:  # until the files are decoded to pixels
            body = await read_either(http, GenerateRequest, HuggingFaceBody, lease)
            if isinstance(body, HuggingFaceBody):
                body = await huggingface.native(http, body, lease)
                context = replace(context, api="huggingface")
                wanted = huggingface.image_format(wanted, body)
            _check_count(body, wanted)
            image_format = body.image_format
            accepted = await service.accept(body, context, follows=wanted == "events")
            del body  # free the uploaded files, which may be megabytes, before the wait
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
    timings = _timings(request, files)
    headers = {"X-Request-Id": request.id, "Server-Timing": _server_timing(timings)}
    if bare:
        headers["X-Seed"] = str(request.params.seeds[0])
        if warnings := _warnings(request):
            headers["X-Warnings"] = json.dumps(warnings)  # JSON keeps the header in ASCII
        return Response(files.contents[0], headers=headers, media_type=f"image/{wanted}")
    document = _document(service, request, files, image_format=image_format)
    return Response(document.model_dump_json(), headers=headers, media_type="application/json")


def _stream(service: Service, accepted: Accepted, image_format: ImageFormat) -> StreamingResponse:
    return StreamingResponse(
        _sse(service, accepted, image_format),
        media_type="text/event-stream",
        headers={
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            "X-Request-Id": accepted.request.id,
        },
    )


async def _sse(service: Service, accepted: Accepted, image_format: ImageFormat) -> AsyncIterator[bytes]:
    request = accepted.request
    try:
        async for update in _updates(service, accepted):
            yield await _describe(service, request, update, image_format)
    finally:
        request.cancel()  # the caller closed the stream; without effect on a request that has ended


async def _updates(service: Service, accepted: Accepted) -> AsyncIterator[Event | QueuedEvent | None]:
    """The events of the request, its position whenever that has changed, and None after a long silence."""
    request = accepted.request
    queued = _queued(service, request, accepted.position)
    yield queued
    silent = 0.0
    async for event in accepted.event_queue.events(keepalive=_POLL_SECONDS):
        update: Event | QueuedEvent | None = event
        if update is None:
            silent += _POLL_SECONDS
            position = service.runtime.batcher.position(request)
            if position is not None and position != queued.position:
                update = queued = _queued(service, request, position)
            elif silent < KEEPALIVE_SECONDS:
                continue
        silent = 0.0
        yield update


def _queued(service: Service, request: Request, position: int) -> QueuedEvent:
    seconds = service.runtime.batcher.delay(request)
    return QueuedEvent(id=request.id, position=position, estimate_s=round(seconds, 1) if seconds else None)


async def _describe(
    service: Service, request: Request, update: Event | QueuedEvent | None, image_format: ImageFormat
) -> bytes:
    match update:
        case None:
            return KEEPALIVE_COMMENT
        case QueuedEvent():
            return _event("queued", update)
        case Started():
            return _event("started", StartedEvent(id=request.id))
        case Stepped(step, steps, previews):
            urls = [await run_in_threadpool(_data_url, preview) for preview in previews]
            return _event("step", StepEvent(step=step, steps=steps, preview=urls[0] if urls else None, previews=urls))
        case Completed():
            files = await service.encode_images(request, update, image_format)
            return _event("completed", _document(service, request, files, image_format=image_format))
        case Failed(error):
            return _event("error", problem(error))


def _data_url(image: Image) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images.encode(image, "jpeg")).decode()


def _event(name: str, document: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=document.model_dump_json())


def _document(service: Service, request: Request, files: Files, *, image_format: ImageFormat) -> GenerateResponse:
    params = request.params
    return GenerateResponse(
        id=request.id,
        model=service.model.manifest.name,
        images=[
            GeneratedImage(seed=seed, format=image_format, image=base64.b64encode(content).decode())
            for seed, content in zip(params.seeds, files.contents, strict=True)
        ],
        parameters=Parameters.of(params),
        timings=_timings(request, files),
        warnings=_warnings(request),
    )


def _timings(request: Request, files: Files) -> Timings:
    spent = request.timings
    return Timings(
        queue=spent["queue"],
        encode=spent["encode"],
        denoise=spent["denoise"],
        decode=spent["decode"],
        image=files.seconds,
        total=sum(spent.values()) + files.seconds,
    )


def _server_timing(timings: Timings) -> str:
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in timings.model_dump().items())


def _warnings(request: Request) -> list[str]:
    return request.params.warnings
