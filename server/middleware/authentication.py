"""Who sends a request, by its API key. Without one only a few paths are open."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.addresses import network_of
from server.access.credentials import presented_key
from server.access.rates import Rates
from server.middleware.access_log import note
from server.requests.context import Caller
from server.requests.errors import Forbidden, RateLimited, ServerError, Unauthenticated

CALLER = "latentd.caller"  # key of the scope: the Caller whose API key was sent
Find = Callable[[str], Caller | None]
Refuse = Callable[[HttpRequest, ServerError], Response]
_OPEN = {"/", "/docs", "/openapi.json", "/v2"}  # the page, the description, and what probes ask
_OPEN_BELOW = ("/docs/", "/playground/", "/v2/health/")
_ADMIN = {"/metrics"}  # it has every caller's load in it
_FAILURES = "20/minute"  # wrong keys of one address
_BEARER = 'Bearer realm="latentd"'
_BASIC = 'Basic realm="latentd", charset="UTF-8"'


class Authentication:
    """Puts the `Caller` into the scope, or refuses the request before anything of its body is read.

    It stands behind `Paths`, and so sees the paths that the routes see.
    """

    def __init__(self, app: ASGIApp, *, find: Find, refuse: Refuse) -> None:
        self._app = app
        self._find = find
        self._refuse = refuse
        self._failures = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                caller = self._caller(scope)
                scope = {**scope, CALLER: caller}
                if caller:
                    note(scope, caller=caller.name)
            except ServerError as error:
                response = self._refuse(HttpRequest(scope), error)
                if isinstance(error, Unauthenticated):
                    _ask(response, _route(scope))
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """The caller; None for an open path without a key. Raises Unauthenticated, Forbidden, RateLimited."""
        route = _route(scope)
        if is_open(route):
            return None
        key = presented_key(Headers(scope=scope))
        if key is None:
            raise Unauthenticated("This server asks for an API key: send it as Authorization: Bearer KEY.")
        caller = self._find(key) or self._unknown(scope)
        if route in _ADMIN and not caller.is_admin:
            raise Forbidden("This needs the API key of an administrator.")
        return caller

    def _unknown(self, scope: Scope) -> Caller:
        """Raise what is answered to a wrong key. Right ones are answered whatever else their address sends."""
        address = network_of(scope["client"][0] if scope.get("client") else "")
        if not self._failures.count(_FAILURES, address):
            seconds = self._failures.wait(_FAILURES, address)
            raise RateLimited("Too many wrong API keys from your address: correct the key.", retry_after=seconds)
        raise Unauthenticated("The API key is not known: it is mistyped, or was revoked.")


def is_open(route: str) -> bool:
    """Whether `route` is answered without a key."""
    return route in _OPEN or route.startswith(_OPEN_BELOW)


def _route(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _ask(response: Response, route: str) -> None:
    """Name the ways to send a key. Only where clients use it Basic: browsers would ask for a password in a dialogue."""
    if route.startswith("/sdapi/"):
        response.headers.append("WWW-Authenticate", _BASIC)
    response.headers.append("WWW-Authenticate", _BEARER)
