"""Calls from web pages of other origins (CORS)."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

TRUSTED = "latentd.trusted_origin"  # in the scope of requests from an allowed origin
_EXPOSED = ("X-Request-Id", "X-Seed", "X-Warnings", "Server-Timing", "Retry-After", "Location", "X-Job-Id")


def allow_origins(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """`app`, which pages of `origins` may call, with any header; `*` stands for all. No cookies are involved."""
    if not origins:
        return app
    return CORSMiddleware(
        _Trust(app, origins),
        allow_origins=origins,
        allow_methods=("DELETE", "GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
    )


class _Trust:
    """Marks requests from `origins`: browsers send forms without asking first, so their reader must know."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._origins & {"*", Headers(scope=scope).get("origin", "").lower()}:
            scope = {**scope, TRUSTED: True}
        await self._app(scope, receive, send)
