"""Options of the web UI: a caller chooses its checkpoint, and may set the others that it reads to what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from server.api import openapi
from server.api.context import caller_of
from server.api.problems import shorten
from server.api.routes import RawRoute
from server.api.sdapi.bodies import describe_json, read_json
from server.api.sdapi.choices import Choices
from server.api.sdapi.errors import rejected, responses
from server.api.sdapi.translation.checkpoint import checkpoint_of, find_checkpoint
from server.api.sdapi.translation.plan import PREVIEW_EVERY
from server.api.service import Service
from server.requests.errors import InvalidRequest
from server.runtime.models import Model

_MODEL = "sd_model_checkpoint"


class Options(BaseModel):
    """Options by name."""

    model_config = ConfigDict(extra="allow", frozen=True)


def routes(service: Service, choices: Choices) -> APIRouter:
    router = APIRouter(tags=[openapi.SDAPI])
    raw = APIRouter(route_class=RawRoute, tags=[openapi.SDAPI])

    @router.get("/options", operation_id="sdapi_options", summary="The options")
    async def options(http: HttpRequest) -> dict[str, Any]:
        return _options(choices.of(caller_of(http)))

    @raw.post(
        "/options",
        operation_id="sdapi_set_options",
        summary="Choose the checkpoint of the caller; set other options to what they are already",
        response_model=None,
        responses=responses(),
        openapi_extra=describe_json(Options),
    )
    async def set_options(http: HttpRequest) -> Response:
        body = await read_json(http, Options, service)
        wanted, caller = body.model_extra or {}, caller_of(http)
        _check(wanted, choices.of(caller))
        if model := find_checkpoint(service.models, wanted.get(_MODEL), field=_MODEL):
            choices.choose(caller, model)
        return JSONResponse(None)

    @router.get("/cmd-flags", operation_id="sdapi_cmd_flags", summary="Flags of the web UI's command line")
    async def cmd_flags() -> dict[str, Any]:
        return {"api": True}

    @router.post("/refresh-checkpoints", operation_id="sdapi_refresh", summary="Nothing: the checkpoints stay the same")
    async def refresh() -> None:
        return None

    @router.post("/reload-checkpoint", operation_id="sdapi_reload", summary="Nothing: checkpoints stay loaded")
    async def reload() -> dict[str, str]:
        return {}

    @router.post(
        "/unload-checkpoint",
        operation_id="sdapi_unload",
        summary="Refused: checkpoints stay loaded",
        status_code=422,
        responses=responses(),
    )
    async def unload() -> None:
        raise InvalidRequest("Checkpoints stay loaded, since others use them: administrators unload them under /v2.")

    router.include_router(raw)
    return router


def _options(model: Model) -> dict[str, Any]:
    checkpoint = checkpoint_of(model)
    return {
        _MODEL: checkpoint.title,
        "sd_checkpoint_hash": checkpoint.sha256,
        "sd_vae": "Automatic",
        "sd_vae_encode_method": "Full",
        "sd_vae_decode_method": "Full",
        "CLIP_stop_at_last_layers": 1,
        "randn_source": "CPU",
        "eta_noise_seed_delta": 0,
        "samples_save": False,
        "samples_format": "png",
        "live_previews_enable": True,
        "live_previews_image_format": "png",
        "show_progress_every_n_steps": PREVIEW_EVERY,
    }


def _check(wanted: Mapping[str, Any], model: Model) -> None:
    """Raise InvalidRequest unless the options `wanted`, but for the checkpoint, are those of `model` already."""
    known = _options(model)
    for name, value in wanted.items():
        if name not in known:
            raise rejected(shorten(name), "This option is unknown here: leave it out; GET options lists all.")
        if name != _MODEL and value != known[name]:
            raise rejected(name, f"It is {known[name]!r}, and cannot be changed: send it with the request, if at all.")
