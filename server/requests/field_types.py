"""Types of fields that requests of several APIs have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import core_schema

from engines.limits import MAX_SIDE, MIN_SIDE
from server.requests import base64_file


def read_json(value: object) -> object:
    """What a form has as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


@dataclass(frozen=True, slots=True)
class _ShareOrAuto:
    """An annotation of a union: a number above 0 and up to 1, or the string auto.

    With pydantic's own union an error would list both, each under a name that the field does not have.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._read, core_schema.float_schema(gt=0, le=1))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"anyOf": [handler(schema), {"const": "auto"}]}

    def _read(self, value: object, number: core_schema.ValidatorFunctionWrapHandler) -> object:
        return "auto" if isinstance(value, str) and value.lower() == "auto" else number(value)


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
GuidanceEnd = Annotated[float | Literal["auto"], _ShareOrAuto()]
HeightWidth = Annotated[tuple[_Pixels, _Pixels], Field(strict=False), BeforeValidator(read_json)]
TopLeft = Annotated[tuple[_Offset, _Offset], Field(strict=False), BeforeValidator(read_json)]
