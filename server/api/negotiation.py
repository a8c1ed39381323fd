"""Content negotiation: which response format `Accept` asks for."""

from __future__ import annotations

import re
from typing import Literal

from server.requests.errors import NotAcceptable

ResponseFormat = Literal["json", "events", "png", "jpeg", "webp"]
_FORMATS: dict[str, ResponseFormat] = {
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
    "text/event-stream": "events",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
    "image/*": "png",
}


def negotiate(accept: str) -> ResponseFormat:
    """The response format that `Accept` prefers, by its q-values; RFC 9110, section 12.5.1."""
    wanted: list[tuple[float, str]] = []
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        wanted.append((float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0, kind))
    for weight, kind in sorted(wanted, key=lambda pair: -pair[0]):
        if weight > 0 and kind in _FORMATS:
            return _FORMATS[kind]
    raise NotAcceptable("Accept one of application/json, image/png, image/jpeg, image/webp, text/event-stream.")
