"""OpenAI's `GET /v1/models`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends, Response
from fastapi import Request as HttpRequest

from server.api import openapi
from server.api.context import request_id_of
from server.api.openai.errors import OpenAIErrorResponse
from server.api.openai.schemas import Model, ModelList
from server.api.service import Service
from server.requests.errors import FieldError, UnknownModel


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=[openapi.OPENAI], dependencies=[Depends(_name)])
    started = int(time.time())

    def served() -> Model:
        return Model(id=service.model.manifest.name, created=started)

    @router.get("/v1/models", operation_id="openai_models", summary="List the served models")
    async def models() -> ModelList:
        return ModelList(data=[served()])

    @router.get(
        "/v1/models/{model:path}",
        operation_id="openai_model",
        summary="Describe a served model",
        responses={404: {"model": OpenAIErrorResponse, "description": UnknownModel.__doc__}},
    )
    async def describe(model: str) -> Model:
        check_model(model, service)
        return served()

    return router


def _name(http: HttpRequest, response: Response) -> None:
    response.headers["X-Request-Id"] = request_id_of(http)


def check_model(name: str | None, service: Service) -> None:
    """Raise UnknownModel if `name` is another model than the served one."""
    served = service.model.manifest.name
    if name not in (None, served):
        message = f"This server has the model {served} only: leave model out, or see GET /v1/models."
        raise UnknownModel(message, fields=(FieldError("model", message),))
