"""The paths and methods that callers use, as the routes have them."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Paths:
    """Answers HEAD as GET, ignores a trailing slash, and takes paths with and without the proxy's prefix.

    A redirect would lose the prefix and the scheme, which only the proxy knows, and many clients follow none of a POST.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            route = _route(scope["path"], root)
            if root and route == root:  # relative links of the page need the slash
                return await RedirectResponse(f"{root}/")(scope, receive, send)
            scope = {**scope, "path": root + route}
            if scope["method"] == "HEAD":
                scope["method"] = "GET"  # the server, which sees the caller's own, sends no body
        return await self._app(scope, receive, send)


def _route(path: str, root: str) -> str:
    """`path` as a route has it. It begins with `root`, which uvicorn adds: twice if the proxy does not strip it."""
    route = path.removeprefix(root)
    if root and route.startswith(f"{root}/"):
        route = route.removeprefix(root)
    return route.rstrip("/") or "/"
