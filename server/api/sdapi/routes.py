"""The routes under /sdapi/v1."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.sdapi import catalogue, generation, options, png_info, progress
from server.api.sdapi.choices import Choices
from server.api.sdapi.tasks import Tasks
from server.api.service import Service


def routes(service: Service) -> APIRouter:
    """The API of AUTOMATIC1111's web UI."""
    tasks, choices = Tasks(), Choices(service.models)
    router = APIRouter(prefix="/sdapi/v1")
    router.include_router(generation.routes(service, tasks, choices))
    router.include_router(progress.routes(tasks))
    router.include_router(catalogue.routes(service, choices))
    router.include_router(options.routes(service, choices))
    router.include_router(png_info.routes(service))
    return router
