"""The Open Inference Protocol (KServe v2): health, and what is served. Inference goes over `POST /generate`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from server.api import openapi
from server.api.problems import shorten
from server.api.service import Service
from server.requests.errors import STATUS, InvalidRequest, ServerError, UnknownModel
from server.requests.schemas import Readiness
from server.version import VERSION

_READY = {"application/json": {"example": {"ready": True, "detail": "ready"}}}
_LOADING = {"application/json": {"example": {"ready": False, "detail": "warming up 512x512"}}}
_VERSION = "1"  # of the one model
Datatype = Literal["BYTES", "FP32", "INT32", "UINT32"]
_INPUTS: dict[str, Datatype] = {
    "prompt": "BYTES",
    "negative_prompt": "BYTES",
    "width": "INT32",
    "height": "INT32",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "seed": "UINT32",
    "num_images": "INT32",
}


class KServeError(BaseModel):
    """An error, as clients of the protocol read it."""

    error: str


_UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": KServeError, "description": "There is no such model, or version of it."}
}


class ServerMetadata(BaseModel):
    """The server, and the extensions of the protocol that it has."""

    name: Literal["latentd"] = "latentd"
    version: str
    extensions: list[str] = []


class Tensor(BaseModel):
    """An input, which is a field of `/generate`, or the output, which is an image file."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: as many as there are images")


class ModelMetadata(BaseModel):
    """The served model. Inference goes over `POST /generate`, whose fields the inputs are."""

    name: str
    versions: list[str] = [_VERSION]
    platform: str = Field(description="latentd, and the backend that runs the engines")
    inputs: list[Tensor] = [Tensor(name=name, datatype=datatype, shape=[1]) for name, datatype in _INPUTS.items()]
    outputs: list[Tensor] = [Tensor(name="image", datatype="BYTES", shape=[-1])]


class ModelReadiness(BaseModel):
    """Whether requests to the model are accepted, and succeed."""

    name: str
    ready: bool


def error_response(error: ServerError) -> Response:
    return JSONResponse(KServeError(error=error.detail).model_dump(), STATUS[type(error)])


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=[openapi.OPERATION])
    _add_health(router, service)
    _add_server(router)
    _add_models(router, service)
    return router


def _add_health(router: APIRouter, service: Service) -> None:
    @router.get(
        "/v2/health/live",
        operation_id="live",
        summary="Liveness: 200 while the process works, 503 when it should be restarted",
        response_class=Response,
        responses={200: {"description": "The process works."}, 503: {"description": "Restart the process."}},
    )
    async def live() -> Response:
        return Response(status_code=200 if service.runtime.executor.alive else 503)

    @router.get(
        "/v2/health/ready",
        operation_id="ready",
        summary="Readiness: 200 while requests are accepted and succeed, 503 otherwise",
        responses={
            200: {"description": "Requests are accepted, and images succeed.", "content": _READY},
            503: {"description": "Not now; the body says why.", "model": Readiness, "content": _LOADING},
        },
    )
    async def ready(response: Response) -> Readiness:
        ready, detail = service.runtime.executor.readiness
        response.status_code = 200 if ready else 503
        return Readiness(ready=ready, detail=detail)


def _add_server(router: APIRouter) -> None:
    @router.get("/v2", operation_id="server_metadata", summary="Name and version of the server")
    async def server() -> ServerMetadata:
        return ServerMetadata(version=VERSION)


def _add_models(router: APIRouter, service: Service) -> None:
    """A model is named with its version or without; names may have slashes, so the longest paths come first."""

    @router.get("/v2/models/{model:path}/versions/{number}/ready", include_in_schema=False)
    async def version_ready(response: Response, model: str, number: str) -> ModelReadiness:
        _check(service, model, number)
        ready, _ = service.runtime.executor.readiness
        response.status_code = 200 if ready else 503
        return ModelReadiness(name=model, ready=ready)

    @router.get(
        "/v2/models/{model:path}/ready",
        operation_id="model_ready",
        summary="Readiness of a model: 200 while requests to it are accepted and succeed, 503 otherwise",
        responses={**_UNKNOWN, 503: {"model": ModelReadiness, "description": "Not now."}},
    )
    async def ready(response: Response, model: str) -> ModelReadiness:
        return await version_ready(response, model, _VERSION)

    @router.get("/v2/models/{model:path}/versions/{number}", include_in_schema=False)
    async def version_metadata(model: str, number: str) -> ModelMetadata:
        _check(service, model, number)
        return ModelMetadata(name=model, platform=f"latentd_{service.model.backend}")

    @router.get(
        "/v2/models/{model:path}",
        operation_id="model_metadata",
        summary="What a model takes and gives",
        responses=_UNKNOWN,
    )
    async def metadata(model: str) -> ModelMetadata:
        return await version_metadata(model, _VERSION)

    @router.post("/v2/models/{model:path}/infer", include_in_schema=False)
    async def infer(model: str) -> Response:
        raise InvalidRequest(f"Images of {shorten(model)} are made by POST /generate, which /docs describes.")


def _check(service: Service, model: str, number: str) -> None:
    served = service.model.manifest.name
    if (model, number) != (served, _VERSION):
        raise UnknownModel(f"This server has version {_VERSION} of the model {served} only.")
