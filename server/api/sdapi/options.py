"""Options of the web UI. None can be changed, and a client may set those that it reads to what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from engines.manifest import Manifest
from server.api import openapi
from server.api.problems import shorten
from server.api.routes import RawRoute
from server.api.sdapi.bodies import describe_json, read_json
from server.api.sdapi.errors import rejected, responses
from server.api.sdapi.translation.checkpoint import checkpoint_of
from server.api.sdapi.translation.plan import PREVIEW_EVERY
from server.api.service import Service
from server.requests.errors import InvalidRequest

_MODEL = "sd_model_checkpoint"


class Options(BaseModel):
    """Options by name."""

    model_config = ConfigDict(extra="allow", frozen=True)


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=[openapi.SDAPI])
    raw = APIRouter(route_class=RawRoute, tags=[openapi.SDAPI])

    @router.get("/options", operation_id="sdapi_options", summary="The options")
    async def options() -> dict[str, Any]:
        return _options(service.model.manifest)

    @raw.post(
        "/options",
        operation_id="sdapi_set_options",
        summary="Set options to what they are already",
        response_model=None,
        responses=responses(),
        openapi_extra=describe_json(Options),
    )
    async def set_options(http: HttpRequest) -> Response:
        body = await read_json(http, Options, service)
        _check(body.model_extra or {}, service.model.manifest)
        return JSONResponse(None)

    @router.get("/cmd-flags", operation_id="sdapi_cmd_flags", summary="Flags of the web UI's command line")
    async def cmd_flags() -> dict[str, Any]:
        return {"api": True}

    @router.post("/refresh-checkpoints", operation_id="sdapi_refresh", summary="Nothing: one checkpoint is served")
    async def refresh() -> None:
        return None

    @router.post("/reload-checkpoint", operation_id="sdapi_reload", summary="Nothing: the checkpoint stays loaded")
    async def reload() -> dict[str, str]:
        return {}

    @router.post(
        "/unload-checkpoint",
        operation_id="sdapi_unload",
        summary="Refused: the checkpoint stays loaded",
        status_code=422,
        responses=responses(),
    )
    async def unload() -> None:
        raise InvalidRequest("The checkpoint stays loaded, since others use it: stop the server to free its memory.")

    router.include_router(raw)
    return router


def _options(manifest: Manifest) -> dict[str, Any]:
    checkpoint = checkpoint_of(manifest)
    return {
        _MODEL: checkpoint.title,
        "sd_checkpoint_hash": checkpoint.sha256,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "randn_source": "CPU",
        "eta_noise_seed_delta": 0,
        "samples_save": False,
        "samples_format": "png",
        "live_previews_enable": True,
        "live_previews_image_format": "png",
        "show_progress_every_n_steps": PREVIEW_EVERY,
    }


def _check(wanted: Mapping[str, Any], manifest: Manifest) -> None:
    """Raise InvalidRequest unless the options `wanted` are so."""
    known = _options(manifest)
    for name, value in wanted.items():
        if name == _MODEL:
            checkpoint_of(manifest).check(value, field=name)
        elif name not in known:
            raise rejected(shorten(name), "This option is unknown here: leave it out; GET options lists all.")
        elif value != known[name]:
            raise rejected(name, f"It is {known[name]!r}, and cannot be changed: send it with the request, if at all.")
