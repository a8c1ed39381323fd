"""`POST png-info`: the parameters that an image carries."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from server.api import openapi
from server.api.routes import RawRoute
from server.api.sdapi.bodies import describe_json, read_json
from server.api.sdapi.errors import responses
from server.api.service import Service
from server.requests import infotext, uploads
from server.requests.field_types import ImageFile

_KEY = "parameters"


class PngInfoRequest(BaseModel):
    """An image file."""

    model_config = ConfigDict(strict=True, frozen=True)

    image: ImageFile = Field(repr=False, description="a PNG, JPEG or WebP file in base64")


class PngInfo(BaseModel):
    """The text of an image, as it is and by field."""

    info: str = Field(description="the parameters, as the web UI and this server write them; empty if there are none")
    items: dict[str, str] = Field(description="all texts of the file")
    parameters: dict[str, str] = Field(description="info by field")


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=RawRoute, tags=[openapi.SDAPI])

    @router.post(
        "/png-info",
        operation_id="sdapi_png_info",
        summary="The parameters that an image carries",
        response_model=PngInfo,
        responses=responses(),
        openapi_extra=describe_json(PngInfoRequest),
    )
    async def png_info(http: HttpRequest) -> Response:
        with service.bodies.lease() as lease:
            body = await read_json(http, PngInfoRequest, service, lease)
            async with service.readers:
                texts = await run_in_threadpool(uploads.read_texts, body.image, field="image")
        info = texts.get(_KEY, "")
        parameters = infotext.parse(info) if info else {}
        return JSONResponse(PngInfo(info=info, items=texts, parameters=parameters).model_dump())

    return router
