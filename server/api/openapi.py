"""What `/openapi.json` says beyond what FastAPI finds in the routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from server.api import security
from server.requests.errors import STATUS, ServerError, UnknownHost
from server.requests.schemas import MAX_TIMEOUT, Problem

GENERATION, JOBS, MODEL, OPERATION = "generation", "jobs", "model", "operation"  # tags
OPENAI, SDAPI = "OpenAI", "AUTOMATIC1111"  # tags of the APIs of other servers
DESCRIPTION: Mapping[str, Any] = {
    "title": "latentd",
    "summary": "Stable Diffusion server that batches requests at the denoising step.",
    "description": "Errors are problem details (RFC 9457), except in the APIs of other servers, which have their own.",
    "license_info": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
    "servers": [{"url": "/", "description": "this server"}],
    "openapi_tags": [
        {"name": GENERATION, "description": "Images from text and from other images."},
        {"name": JOBS, "description": "Requests whose callers ask for the images later."},
        {"name": MODEL, "description": "What is served, and what a request may ask for."},
        {
            "name": OPERATION,
            "description": "Health and metadata as in the Open Inference Protocol (KServe v2), and metrics.",
        },
        {"name": OPENAI, "description": "OpenAI's Images API, for its clients; errors are in its form."},
        {"name": SDAPI, "description": 'The API of AUTOMATIC1111\'s web UI; errors are `{"detail": …}`.'},
    ],
}
IMAGE = {"schema": {"type": "string", "format": "binary", "description": "one image file"}}
EVENTS = {
    "schema": {"description": "server-sent events: queued, started, step …, completed or error"},
    "example": 'event: queued\ndata: {"id":"8f14e45f","position":0}\n\n',
}
JOB_HEADERS = {"Location": {"description": "path of the job", "schema": {"type": "string"}}}
_CLIENT_GONE = 499  # never sent: nobody is there
_REFERENCE = {"$ref": "#/components/schemas/Problem"}
_SECONDS = {"description": "seconds after which to try again", "schema": {"type": "integer", "minimum": 1}}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "id of the request, which answers, events and log lines repeat; default: a random one",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    "example": "trace-01.span-2",
}
_TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "seconds from its arrival after which the request ends with 504; timeout_s, if shorter, counts",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT},
    "example": 60,
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "makes the request a job: sent again by the same caller, with the same body, it is the same job",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "example": "6b0f5f0e-6f2a-4a3e-9a43-0c0a3f9f3b52",
}
_WAIT = {
    "name": "wait",
    "in": "query",
    "description": "false: do not wait for the images; the answer is 202 with the job",
    "schema": {"type": "boolean", "default": True},
}
_BODIES = {
    "text to image": {
        "prompt": "a red heart on a yellow background",
        "negative_prompt": "text, watermark",
        "num_inference_steps": 20,
        "scheduler": "dpmpp_2m_karras",
        "seed": 7,
    },
    "four images": {"prompt": "a lighthouse at night", "num_images": 4},
    "image to image": {"prompt": "an oil painting", "image": "iVBORw0KGgo=", "strength": 0.6},
    "Hugging Face": {"inputs": "a lighthouse at night", "parameters": {"num_inference_steps": 20}},
}


def describe(app: FastAPI, *, asks_for_keys: bool) -> None:
    """Have `app` describe itself in OpenAPI with what no route says: problem details, and how keys are sent."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(routes=app.routes, version=app.version, tags=app.openapi_tags, **_info(app))
            document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
            app.openapi_schema = security.described(document) if asks_for_keys else security.undescribed(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's own way to extend it


def generate_extra(body: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of `POST /generate` that its endpoint reads by itself, with examples."""
    return request_extra(body, _BODIES)


def request_extra(body: Mapping[str, Any], bodies: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an operation that its endpoint reads by itself: a body as `describe_body` has it, with examples."""
    examples = {name: {"value": value} for name, value in bodies.items()}
    content = {kind: {**media, "examples": examples} for kind, media in body["content"].items()}
    form = content["multipart/form-data"]
    properties = {name: _without_null(field) for name, field in form["schema"]["properties"].items()}
    form["schema"] = {**form["schema"], "properties": properties}
    return {"requestBody": {**body, "content": content}, "parameters": [_WAIT, _REQUEST_ID, _TIMEOUT, _IDEMPOTENCY_KEY]}


def _without_null(field: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a field of a form, which has text and files only: what is null in JSON is left out."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    described = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    return described | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds}) if kinds else dict(field)


def everywhere() -> dict[int | str, dict[str, Any]]:
    """The error responses that any operation may have: of the transport and of middleware, which no route sees."""
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    return {
        int(HTTPStatus.MISDIRECTED_REQUEST): {"description": UnknownHost.__doc__},
        int(status): {**_problem(status), "description": "The headers are too large, or too many."},
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route by status: those of a route that generates images, where none are named."""
    everything = {*STATUS.values()} - {_CLIENT_GONE}
    return {status: _problem(status) for status in sorted(statuses or everything)}


def errors(
    model: type[BaseModel], status_of: Callable[[type[ServerError]], int] = STATUS.__getitem__
) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route that generates images, by status, in an API whose errors are `model`."""
    causes: dict[int, list[type[ServerError]]] = {}
    for error in STATUS:
        causes.setdefault(status_of(error), []).append(error)
    return {
        status: {"model": model, "description": " ".join(_sentences(causes[status])), **_retried(status)}
        for status in sorted(causes.keys() - {_CLIENT_GONE})
    }


def _retried(status: int) -> dict[str, Any]:
    return {"headers": {"Retry-After": _SECONDS}} if status in (429, 503) else {}


def _problem(status: int) -> dict[str, Any]:
    causes = [error for error, its_status in STATUS.items() if its_status == status]
    response: dict[str, Any] = {
        "description": " ".join(_sentences(causes)),
        "content": {"application/problem+json": {"schema": _REFERENCE, "example": _example(status)}},
    }
    return response | _retried(status)


def _sentences(causes: Iterable[type[Exception]]) -> Iterator[str]:
    for cause in causes:
        yield (cause.__doc__ or "").partition("\n")[0]


def _example(status: int) -> dict[str, Any]:
    details = {
        422: "num_inference_steps: Input should be less than or equal to 200",
        429: "64 requests are waiting: try again later.",
    }
    phrase = HTTPStatus(status)
    detail = details.get(status, f"{phrase.description or phrase.phrase}.")
    errors = [{"field": "num_inference_steps", "message": detail.partition(": ")[2]}] if status == 422 else []
    return Problem(title=phrase.phrase, status=status, detail=detail, errors=errors).model_dump()


def _info(app: FastAPI) -> dict[str, Any]:
    names = ("title", "summary", "description", "license_info", "servers")
    return {name: getattr(app, name) for name in names}
