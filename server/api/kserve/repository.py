"""Triton's model repository extension: which models there are, and loading and unloading them, by administrators.

The models are those that the server was started with; nothing else can be loaded.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field

from server.api.bodies import ModelT, read_any_json
from server.api.context import check_administrator
from server.api.kserve.errors import KServeError
from server.api.kserve.models import UNKNOWN, VERSION_OF_MODELS
from server.api.problems import shorten
from server.api.service import Service
from server.requests.errors import InvalidRequest, ModelNotLoaded
from server.runtime.models import Model, State

_POLL_SECONDS = 0.05
_HARMLESS = {"unload_dependents"}  # no model is a part of another
_STATES: dict[State, str] = {  # as Triton calls them
    "unloaded": "UNAVAILABLE",
    "loading": "LOADING",
    "ready": "READY",
    "unloading": "UNLOADING",
    "failed": "UNAVAILABLE",
}


class IndexRequest(BaseModel):
    """Which models are listed."""

    model_config = ConfigDict(strict=True, extra="ignore")

    ready: bool = Field(False, description="only those that are ready")


class ModelState(BaseModel):
    """A model that can be loaded, and its state."""

    name: str
    version: str = VERSION_OF_MODELS
    state: str = Field(description=f"{', '.join(dict.fromkeys(_STATES.values()))}")
    reason: str = Field(description="why it is so; empty where there is nothing to say")


class ControlRequest(BaseModel):
    """How a model is loaded or unloaded."""

    model_config = ConfigDict(strict=True, extra="ignore")

    parameters: dict[str, Any] = Field({}, description="unload_dependents has no effect; others are refused")


def routes(service: Service) -> APIRouter:
    router = APIRouter(responses={**UNKNOWN, 403: {"model": KServeError, "description": "For administrators only."}})

    @router.post(
        "/v2/repository/index",
        operation_id="model_index",
        summary="List the models that can be loaded, and their states",
        openapi_extra=_describe(IndexRequest),
    )
    async def index(http: HttpRequest) -> list[ModelState]:
        wanted = await _read(http, IndexRequest)
        return [_state_of(model) for model in service.models if model.ready or not wanted.ready]

    @router.post(
        "/v2/repository/models/{model:path}/load",
        operation_id="load_model",
        summary="Load a model; answered when it is ready",
        response_class=Response,
        responses={503: {"model": KServeError, "description": "It was not loaded; the body says why."}},
        openapi_extra=_describe(ControlRequest),
    )
    async def load(model: str, http: HttpRequest) -> Response:
        _check(await _read(http, ControlRequest))
        found = service.models.find(shorten(model))
        service.models.load(found.name)
        await _loaded(found)
        return Response()

    @router.post(
        "/v2/repository/models/{model:path}/unload",
        operation_id="unload_model",
        summary="Unload a model, once its accepted requests have ended; answered at once",
        response_class=Response,
        openapi_extra=_describe(ControlRequest),
    )
    async def unload(model: str, http: HttpRequest) -> Response:
        _check(await _read(http, ControlRequest))
        service.models.unload(service.models.find(shorten(model)).name)
        return Response()

    async def _read(http: HttpRequest, kind: type[ModelT]) -> ModelT:
        check_administrator(http)
        with service.bodies.lease() as lease:
            return await read_any_json(http, kind, lease)

    return router


async def _loaded(model: Model) -> None:
    """Wait until the model is ready. Raises ModelNotLoaded, with the reason."""
    while not model.ready:
        if model.state in ("failed", "unloaded"):
            raise ModelNotLoaded(f"{model.name} was not loaded: {model.reason or 'it was unloaded meanwhile.'}")
        await asyncio.sleep(_POLL_SECONDS)


def _check(request: ControlRequest) -> None:
    if unknown := next((name for name in request.parameters if name not in _HARMLESS), None):
        raise InvalidRequest(f"parameters.{shorten(unknown)}: Models are loaded as they were built: leave it out.")


def _state_of(model: Model) -> ModelState:
    return ModelState(name=model.name, state=_STATES[model.state], reason=model.reason)


def _describe(kind: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that may be left out."""
    return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}}}
