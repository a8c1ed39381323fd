"""What the models are, and whether they are ready. Inference goes over `POST /generate`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from server.api.kserve.errors import KServeError
from server.api.problems import shorten
from server.api.service import Service
from server.requests.errors import InvalidRequest, UnknownModel
from server.requests.schemas import SIZE_CONDITIONS
from server.runtime.models import Model

VERSION_OF_MODELS = "1"  # the only one of each
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
UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": KServeError, "description": "There is no such model, or version of it."}
}


class Tensor(BaseModel):
    """An input, which is a field of `/generate`, or the output, which is an image file."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: as many as there are images")


class ModelMetadata(BaseModel):
    """A model. Inference goes over `POST /generate`, whose fields the inputs are, with the model's name as `model`."""

    name: str
    versions: list[str] = [VERSION_OF_MODELS]
    platform: str = Field(description="latentd, and the backend that runs the engines")
    inputs: list[Tensor]
    outputs: list[Tensor] = [Tensor(name="image", datatype="BYTES", shape=[-1])]


class ModelReadiness(BaseModel):
    """Whether requests to the model are accepted, and succeed."""

    name: str
    ready: bool


def routes(service: Service) -> APIRouter:
    """A model is named with its version or without; names may have slashes, so the longest paths come first."""
    router = APIRouter()

    @router.get("/v2/models/{model:path}/versions/{number}/ready", include_in_schema=False)
    async def version_ready(response: Response, model: str, number: str) -> ModelReadiness:
        ready = _find(service, model, number).ready and service.runtime.executor.readiness[0]
        response.status_code = 200 if ready else 503
        return ModelReadiness(name=model, ready=ready)

    @router.get(
        "/v2/models/{model:path}/ready",
        operation_id="model_ready",
        summary="Readiness of a model: 200 while requests to it are accepted and succeed, 503 otherwise",
        responses={**UNKNOWN, 503: {"model": ModelReadiness, "description": "Not now."}},
    )
    async def ready(response: Response, model: str) -> ModelReadiness:
        return await version_ready(response, model, VERSION_OF_MODELS)

    @router.get("/v2/models/{model:path}/versions/{number}", include_in_schema=False)
    async def version_metadata(model: str, number: str) -> ModelMetadata:
        found = _find(service, model, number)
        return ModelMetadata(name=model, platform=f"latentd_{found.backend}", inputs=_inputs(found))

    @router.get(
        "/v2/models/{model:path}",
        operation_id="model_metadata",
        summary="What a model takes and gives",
        responses=UNKNOWN,
    )
    async def metadata(model: str) -> ModelMetadata:
        return await version_metadata(model, VERSION_OF_MODELS)

    @router.post("/v2/models/{model:path}/infer", include_in_schema=False)
    async def infer(model: str) -> Response:
        raise InvalidRequest(f"Images of {shorten(model)} are made by POST /generate, which /docs describes.")

    return router


def _inputs(model: Model) -> list[Tensor]:
    """The fields that a request to `model` may have."""
    inputs = [Tensor(name=name, datatype=kind, shape=[1]) for name, kind in _INPUTS.items()]
    if model.manifest.has_size_conditions:
        inputs += [Tensor(name=name, datatype="INT32", shape=[2]) for name in SIZE_CONDITIONS]
    if model.intake.loras and model.manifest.lora:
        inputs.append(Tensor(name="loras", datatype="BYTES", shape=[1]))  # JSON, as in a form
    return inputs


def _find(service: Service, name: str, number: str) -> Model:
    """Raises UnknownModel."""
    if not name or number != VERSION_OF_MODELS:
        raise UnknownModel(f"This server has version {VERSION_OF_MODELS} of each model only.")
    return service.models.find(shorten(name))
