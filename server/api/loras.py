"""`GET /loras`: what requests may choose."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from server.api import openapi
from server.api.service import Service
from server.requests.schemas import LoraDescription
from server.runtime.models import Model


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/loras",
        operation_id="loras",
        tags=[openapi.MODEL],
        summary="List the LoRAs that requests may choose, and files that cannot be used",
        responses=openapi.problems(404, 503),
    )
    def loras(  # in a thread: it reads files
        model: Annotated[
            str | None, Query(description="the model to use them with; default: the first of GET /models")
        ] = None,
    ) -> list[LoraDescription]:
        return loras_of(service.models.find(model))

    return router


def loras_of(model: Model) -> list[LoraDescription]:
    """All LoRAs of the folder, which is read for it, as the model takes them. Raises LoraUnreadable."""
    loras, resident = model.intake.loras, model.resident_loras
    listed = loras.describe() if loras else []
    return [lora.model_copy(update={"resident": lora.sha256 in resident}) for lora in listed]
