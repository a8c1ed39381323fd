"""Headers that tell browsers to do with an answer no more than it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DEFAULTS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),  # pages send their own
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_NOT_KEPT = (b"cache-control", b"no-store")  # prompts and pictures are for their caller alone
_REVALIDATED = (b"cache-control", b"no-cache")  # what has an ETag is a file that everyone may see


class SecurityHeaders:
    """Adds the headers that an answer does not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": completed(list(message["headers"]))}
            await send(message)

        return await self._app(scope, receive, send_with_headers)


def completed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers`, and those of every answer that are not among them."""
    given = {name for name, _ in headers}
    cache = _REVALIDATED if b"etag" in given else _NOT_KEPT
    return headers + [header for header in (*_DEFAULTS, cache) if header[0] not in given]
