"""The API key that a request presents."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from starlette.datastructures import Headers

from server.requests.errors import Unauthenticated

_WAYS = "send Authorization: Bearer KEY, X-API-Key: KEY, or Basic with the key as password"


def presented_key(headers: Headers) -> str | None:
    """The key in `X-API-Key`, otherwise the one in `Authorization`; None where there is neither.

    A proxy in front may have used up `Authorization` for itself. Messages repeat nothing of what was sent.

    Raises:
        Unauthenticated: it cannot be read.
    """
    if key := _only(headers.getlist("x-api-key"), "X-API-Key"):
        return key
    scheme, _, rest = _only(headers.getlist("authorization"), "Authorization").partition(" ")
    match scheme.lower():
        case "":
            return None
        case "bearer":
            return rest.strip()
        case "basic":
            return _password(rest.strip())
        case _:
            raise Unauthenticated(f"The scheme of Authorization is not supported: {_WAYS}.")


def _only(values: Sequence[str], name: str) -> str:
    if len(values) > 1:
        raise Unauthenticated(f"{name} was sent more than once: send it once.")
    return values[0].strip() if values else ""


def _password(text: str) -> str:
    try:
        _, colon, password = base64.b64decode(text, validate=True).partition(b":")
    except (binascii.Error, ValueError):
        colon = b""
    if not colon:
        raise Unauthenticated(f"Authorization is not valid Basic authentication (RFC 7617): {_WAYS}.")
    return password.decode("latin-1")
