"""OpenAI's Images API: `POST /v1/images/generations` and `/v1/images/edits`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from server.api import openapi
from server.api.bodies import describe_body, read_body
from server.api.context import context_of
from server.api.error_responses import error_response
from server.api.openai.errors import OpenAIErrorResponse, status_of
from server.api.openai.replies import EventWriter, Operation, Reply
from server.api.openai.schemas import EditsBody, GenerationsBody, ImagesBody, ImagesResponse
from server.api.outcomes import wait_for_outcome
from server.api.routes import RawRoute
from server.api.service import Accepted, Service
from server.api.streaming import event_stream
from server.requests.errors import FieldError, InvalidRequest
from server.requests.request import Failed

_EVENTS = {
    "schema": {"description": "server-sent events: partial_image …, then completed or error"},
    "example": 'event: image_generation.completed\ndata: {"type":"image_generation.completed","b64_json":"…"}\n\n',
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with stream, server-sent events.",
        "content": {"text/event-stream": _EVENTS},
    },
    **openapi.errors(OpenAIErrorResponse, status_of),
}
_GENERATIONS = {
    "an image": {"prompt": "a red heart on a yellow background"},
    "four images": {"prompt": "a lighthouse at night", "n": 4, "response_format": "b64_json"},
    "a stream": {"prompt": "a penguin", "stream": True, "partial_images": 2},
}
_EDITS = {"an edit": {"prompt": "an oil painting", "image": "iVBORw0KGgo="}}


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=RawRoute, tags=[openapi.OPENAI])

    @router.post(
        "/v1/images/generations",
        operation_id="openai_generations",
        summary="Generate images from a prompt",
        response_model=ImagesResponse,
        responses=_RESPONSES,
        openapi_extra=openapi.request_extra(describe_body(GenerationsBody), _GENERATIONS),
    )
    async def generations(http: HttpRequest) -> Response:
        return await _answer(service, http, GenerationsBody, "image_generation")

    @router.post(
        "/v1/images/edits",
        operation_id="openai_edits",
        summary="Edit an image, or a part of it",
        response_model=ImagesResponse,
        responses=_RESPONSES,
        openapi_extra=openapi.request_extra(describe_body(EditsBody), _EDITS),
    )
    async def edits(http: HttpRequest) -> Response:
        return await _answer(service, http, EditsBody, "image_edit")

    return router


async def _answer(service: Service, http: HttpRequest, kind: type[ImagesBody], operation: Operation) -> Response:
    context = context_of(http, "openai")
    service.check(context.caller)
    with service.bodies.lease() as lease:  # until the files are decoded to pixels
        body = await read_body(http, kind, lease)
        model = service.models.find(body.model)
        reply = Reply.to(body, operation)
        with _names_of(body):
            native = body.native(steps=model.manifest.defaults.num_inference_steps)
            accepted = await service.accept(native, context, follows=reply.streams)
        del body, native  # free the uploaded files, which may be megabytes, before the wait
    if reply.streams:
        return event_stream(accepted, EventWriter(service, accepted.request, reply).write)
    return await _respond(service, accepted, http, reply)


@contextmanager
def _names_of(body: ImagesBody) -> Iterator[None]:
    """Have errors name the fields of `body`, where those of `/generate` have other names."""
    side = "width" if body.width or body.height else "size"
    names = {"num_images": "n", "width": side, "height": side}
    try:
        yield
    except InvalidRequest as error:
        fields = tuple(FieldError(names.get(field.field, field.field), field.message) for field in error.fields)
        raise InvalidRequest(error.detail, fields=fields) from error


async def _respond(service: Service, accepted: Accepted, http: HttpRequest, reply: Reply) -> Response:
    """Wait for the images, and send them."""
    request = accepted.request
    outcome = await wait_for_outcome(accepted, http)
    if isinstance(outcome, Failed):
        return error_response(http, outcome.error)
    files = await service.encode_images(request, outcome, reply.image_format, quality=reply.quality)
    document = reply.document(request, files).model_dump_json()
    return Response(document, headers=reply.headers(request, files), media_type="application/json")
