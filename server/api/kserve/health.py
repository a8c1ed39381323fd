"""Health, and what the server is."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from server.api.service import Service
from server.requests.schemas import Readiness
from server.version import VERSION

_READY = {"application/json": {"example": {"ready": True, "detail": "ready"}}}
_LOADING = {"application/json": {"example": {"ready": False, "detail": "warming up 512x512"}}}


class ServerMetadata(BaseModel):
    """The server, and the extensions of the protocol that it has."""

    name: Literal["latentd"] = "latentd"
    version: str
    extensions: list[str] = ["model_repository"]


def routes(service: Service) -> APIRouter:
    router = APIRouter()

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

    @router.get("/v2", operation_id="server_metadata", summary="Name and version of the server")
    async def server() -> ServerMetadata:
        return ServerMetadata(version=VERSION)

    return router
