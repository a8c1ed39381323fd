"""`POST /generate`: JSON, an image file, or server-sent events, negotiated by `Accept`."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, cast

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from server.api import openapi
from server.api.bodies import describe_body, read_body
from server.api.callers import caller_of
from server.api.negotiation import ResponseFormat, negotiate
from server.api.problems import problem, problem_response
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
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class _RawRoute(APIRoute):
    """A route that passes the HTTP request to its endpoint unparsed; the endpoint reads the body itself."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler: Callable[[HttpRequest], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=_RawRoute)

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
            **openapi.problems(),
        },
        openapi_extra=openapi.generate_extra(describe_body(GenerateRequest)),
    )
    async def generate(http: HttpRequest) -> Response:
        wanted = negotiate(http.headers.getlist("accept"))
        caller = caller_of(http)
        service.check(caller)
        with service.bodies.lease() as lease:  # until the files are decoded to pixels
            body = await read_body(http, GenerateRequest, lease)
            _check_count(body, wanted)
            image_format = body.image_format
            accepted = await service.accept(
                body, request_id=_request_id(http), caller=caller, follows=wanted == "events"
            )
            del body  # free the uploaded files, which may be megabytes, before the wait
        if wanted == "events":
            return _stream(service, accepted, image_format)
        return await _respond(service, accepted, http, wanted=wanted, image_format=image_format)

    return router


def _check_count(body: GenerateRequest, wanted: ResponseFormat) -> None:
    if wanted in images.FORMATS and body.num_images > 1:
        message = "An image file holds one image: set num_images to 1, or accept application/json."
        raise InvalidRequest(message, fields=(FieldError("num_images", message),))


def _request_id(http: HttpRequest) -> str | None:
    given = http.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else None


async def _respond(
    service: Service, accepted: Accepted, http: HttpRequest, *, wanted: ResponseFormat, image_format: ImageFormat
) -> Response:
    """Wait for the images; cancel the request at once if the caller disconnects."""
    request = accepted.request
    watcher = asyncio.ensure_future(_cancel_on_disconnect(request, http))
    try:
        outcome = await accepted.event_queue.outcome()
    finally:
        watcher.cancel()
        request.cancel()
    if isinstance(outcome, Failed):
        return problem_response(problem(outcome.error), retry_after=outcome.error.retry_after)
    bare = wanted in images.FORMATS
    files = await service.encode_images(outcome, cast(ImageFormat, wanted) if bare else image_format)
    timings = _timings(request, files)
    headers = {"X-Request-Id": request.id, "Server-Timing": _server_timing(timings)}
    if bare:
        headers["X-Seed"] = str(request.params.seeds[0])
        if warnings := _warnings(request):
            headers["X-Warnings"] = json.dumps(warnings)  # JSON keeps the header in ASCII
        return Response(files.contents[0], headers=headers, media_type=f"image/{wanted}")
    document = _document(service, request, files, image_format=image_format)
    return Response(document.model_dump_json(), headers=headers, media_type="application/json")


async def _cancel_on_disconnect(request: Request, http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    request.cancel()


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
        yield _event("queued", QueuedEvent(id=request.id, position=accepted.position))
        async for event in accepted.event_queue.events(keepalive=KEEPALIVE_SECONDS):
            if event is None:
                yield KEEPALIVE_COMMENT
            else:
                yield await _describe(service, request, event, image_format)
    finally:
        request.cancel()  # the caller closed the stream; without effect on a request that has ended


async def _describe(service: Service, request: Request, event: Event, image_format: ImageFormat) -> bytes:
    match event:
        case Started():
            return _event("started", StartedEvent(id=request.id))
        case Stepped(step, steps, preview):
            url = None if preview is None else await run_in_threadpool(_data_url, preview)
            return _event("step", StepEvent(step=step, steps=steps, preview=url))
        case Completed():
            files = await service.encode_images(event, image_format)
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
