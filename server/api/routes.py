"""Routes whose endpoints read the HTTP request themselves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.routing import APIRoute


class RawRoute(APIRoute):
    """A route that passes the HTTP request to its endpoint unparsed; the endpoint reads the body itself."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handler: Callable[[HttpRequest], Coroutine[Any, Any, Response]] = self.endpoint
        return handler
