"""Types of fields that requests of several APIs have."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from engines.limits import MAX_SIDE, MIN_SIDE
from server.requests import base64_file


def read_json(value: object) -> object:
    """What a form has as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


ImageFile = Annotated[
    bytes,
    BeforeValidator(base64_file.decode),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 1}),
]
Side = Annotated[
    int, Field(ge=MIN_SIDE, le=MAX_SIDE, description="in pixels; default: the first resolution of the model")
]
_Pixels = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)]
_Offset = Annotated[int, Field(strict=True, ge=0, le=MAX_SIDE)]
HeightWidth = Annotated[tuple[_Pixels, _Pixels], Field(strict=False), BeforeValidator(read_json)]
TopLeft = Annotated[tuple[_Offset, _Offset], Field(strict=False), BeforeValidator(read_json)]
