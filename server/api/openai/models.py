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
from server.requests.errors import UnknownModel
from server.runtime import models


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=[openapi.OPENAI], dependencies=[Depends(_name)])
    started = int(time.time())

    def described(model: models.Model) -> Model:
        return Model(id=model.name, created=started, state=model.state)

    @router.get("/v1/models", operation_id="openai_models", summary="List the models")
    async def list_models() -> ModelList:
        return ModelList(data=[described(model) for model in service.models])

    @router.get(
        "/v1/models/{model:path}",
        operation_id="openai_model",
        summary="Describe a model",
        responses={404: {"model": OpenAIErrorResponse, "description": UnknownModel.__doc__}},
    )
    async def describe(model: str) -> Model:
        return described(service.models.find(model))

    return router


def _name(http: HttpRequest, response: Response) -> None:
    response.headers["X-Request-Id"] = request_id_of(http)
