"""Metrics, and descriptions of the models and their schedulers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from engines.backends.available import precision_of
from engines.schedulers import NAMES, describe
from server.api import openapi
from server.api.service import Service
from server.requests.schemas import ModelInfo, SchedulerDescription
from server.runtime.models import Model

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

    @router.get(
        "/models",
        operation_id="models",
        tags=[openapi.MODEL],
        summary="List the models; the first is the default",
    )
    def models() -> list[ModelInfo]:
        return [_describe(model) for model in service.models]

    @router.get(
        "/schedulers",
        operation_id="schedulers",
        tags=[openapi.MODEL],
        summary="List the schedulers of a model, their aliases and their options",
        responses=openapi.problems(404),
    )
    def schedulers(
        model: Annotated[str | None, Query(description="its name; default: the first of GET /models")] = None,
    ) -> list[SchedulerDescription]:
        prediction = service.models.find(model).manifest.noise_schedule.prediction_type
        return [
            SchedulerDescription.model_validate(one, from_attributes=True)
            for one in describe()
            if prediction in one.predictions
        ]

    return router


def _describe(model: Model) -> ModelInfo:
    manifest = model.manifest
    return ModelInfo(
        name=model.name,
        state=model.state,
        reason=model.reason,
        backend=model.backend,
        precision=precision_of(manifest, model.backend),
        resolutions=[str(size) for size in manifest.resolutions],
        schedulers=list(NAMES),
        scheduler=manifest.defaults.scheduler,
        num_inference_steps=manifest.defaults.num_inference_steps,
        guidance_scale=manifest.defaults.guidance_scale,
        timestep_spacing=manifest.defaults.timestep_spacing,
        eta=manifest.defaults.eta,
        timesteps=manifest.defaults.timesteps,
        step_cache=model.intake.has_step_cache,
        fast_decoder=manifest.has_fast_decoder,
        size_conditions=manifest.has_size_conditions,
        max_rows=manifest.max_rows,
        examples=list(manifest.examples),
        notes=manifest.notes,
        is_for_inpainting=manifest.is_for_inpainting,
    )
