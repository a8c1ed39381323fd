"""Read the JSON bodies of this API."""

from __future__ import annotations

from typing import Any

from fastapi import Request as HttpRequest
from pydantic import BaseModel

from server.api.bodies import ModelT, read_body
from server.api.body_limits import Lease
from server.api.service import Service
from server.requests.errors import UnsupportedMediaType


async def read_json(http: HttpRequest, model: type[ModelT], service: Service, lease: Lease | None = None) -> ModelT:
    """Read the body into `model`; for the errors see `read_body`. Without a `lease` it takes no memory afterwards."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Send JSON with Content-Type: application/json.")
    if lease:
        return await read_body(http, model, lease)
    with service.bodies.lease() as its_own:
        return await read_body(http, model, its_own)


def describe_json(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of the bodies that `read_json` accepts."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}
