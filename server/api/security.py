"""What `/openapi.json` says about API keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.middleware.authentication import is_open
from server.requests.errors import Forbidden, Unauthenticated

_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "basic": {"type": "http", "scheme": "basic", "description": "the key as password, with any user name"},
}
_REFUSED = {
    "401": {"description": Unauthenticated.__doc__},
    "403": {"description": Forbidden.__doc__},
    "429": {"description": "Too many wrong API keys came from the caller's address."},
}
_ASKED = "Calls need an API key."
_NOT_ASKED = "No API keys are asked for: a server that is started with `--api-keys` does."


def described(document: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a server that asks for keys."""
    components = {**document["components"], "securitySchemes": _SCHEMES}
    paths = {path: (_opened if is_open(path) else _closed)(item) for path, item in document["paths"].items()}
    security: list[dict[str, list[str]]] = [{name: []} for name in _SCHEMES]
    return {**_saying(document, _ASKED), "paths": paths, "components": components, "security": security}


def undescribed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a server that does not."""
    return {**_saying(document, _NOT_ASKED), "security": []}


def _opened(item: Mapping[str, Any]) -> dict[str, Any]:
    return {method: {**operation, "security": []} for method, operation in item.items()}


def _closed(item: Mapping[str, Any]) -> dict[str, Any]:
    return {method: {**operation, "responses": _REFUSED | operation["responses"]} for method, operation in item.items()}


def _saying(document: Mapping[str, Any], sentence: str) -> dict[str, Any]:
    info = document["info"]
    return {**document, "info": {**info, "description": f"{info['description']} {sentence}"}}
