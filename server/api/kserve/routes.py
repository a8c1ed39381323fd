"""The routes under /v2."""

from __future__ import annotations

from fastapi import APIRouter

from server.api import openapi
from server.api.kserve import health, models, repository
from server.api.service import Service


def routes(service: Service) -> APIRouter:
    """The Open Inference Protocol. Images are made by `POST /generate`."""
    router = APIRouter(tags=[openapi.OPERATION])
    router.include_router(health.routes(service))
    router.include_router(repository.routes(service))
    router.include_router(models.routes(service))
    return router
