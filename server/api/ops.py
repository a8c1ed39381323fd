"""Metrics, and descriptions of the model and the schedulers."""

from __future__ import annotations

from fastapi import APIRouter, Response

from engines.backends.available import precision_of
from engines.schedulers import NAMES, describe
from server.api import openapi
from server.api.service import Service
from server.requests.schemas import ModelInfo, SchedulerDescription

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_EXPOSITION = {"text/plain": {"schema": {"type": "string"}, "example": "latentd_ready 1.0\n"}}


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/metrics",
        operation_id="metrics",
        tags=[openapi.OPERATION],
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "The text exposition format.", "content": _EXPOSITION}},
    )
    def metrics() -> Response:
        return Response(service.runtime.metrics.render(), media_type=_METRICS_TYPE)

    @router.get("/models", operation_id="models", tags=[openapi.MODEL], summary="List the served models")
    def models() -> list[ModelInfo]:
        manifest = service.model.manifest
        return [
            ModelInfo(
                name=manifest.name,
                backend=service.model.backend,
                precision=precision_of(manifest, service.model.backend),
                resolutions=[str(size) for size in manifest.resolutions],
                schedulers=list(NAMES),
                scheduler=manifest.defaults.scheduler,
                num_inference_steps=manifest.defaults.num_inference_steps,
                guidance_scale=manifest.defaults.guidance_scale,
                step_cache=service.runtime.models.default.intake.has_step_cache,
                max_rows=manifest.max_rows,
                examples=list(manifest.examples),
                notes=manifest.notes,
            )
        ]

    @router.get(
        "/schedulers",
        operation_id="schedulers",
        tags=[openapi.MODEL],
        summary="List the schedulers, their aliases and their options",
    )
    def schedulers() -> list[SchedulerDescription]:
        prediction = service.model.manifest.noise_schedule.prediction_type
        return [
            SchedulerDescription.model_validate(one, from_attributes=True)
            for one in describe()
            if prediction in one.predictions
        ]

    return router
