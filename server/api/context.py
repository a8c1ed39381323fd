"""Who sends a request, and what its headers ask for."""

from __future__ import annotations

import math
import re
import time
import uuid

from fastapi import Request as HttpRequest

from server.access.addresses import is_loopback, network_of
from server.middleware.access_log import note
from server.middleware.authentication import CALLER
from server.requests.context import Api, Caller, RequestContext
from server.requests.errors import Forbidden, InvalidRequest
from server.requests.schemas import MAX_TIMEOUT

_ID = "latentd.request_id"  # of the scope
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def context_of(http: HttpRequest, api: Api) -> RequestContext:
    """The context of a request to `api`. Raises InvalidRequest."""
    note(http.scope, api=api)
    return RequestContext(
        caller=caller_of(http),
        api=api,
        request_id=request_id_of(http),
        timeout=_timeout(http),
        arrived=time.perf_counter(),
        traceparent=http.headers.get("traceparent"),
    )


def caller_of(http: HttpRequest) -> Caller:
    """The owner of the API key; without one the address of the client, of IPv6 its network, and "" for a Unix socket.

    Behind one of --trusted-proxies, uvicorn takes the address from X-Forwarded-For.
    """
    known: Caller | None = http.scope.get(CALLER)
    return known or Caller(network_of(http.client.host if http.client else ""))


def check_administrator(http: HttpRequest) -> None:
    """Raise Forbidden unless the key is an administrator's; where there are no keys, unless it comes from this machine.

    What else a server without keys answers to everyone harms others only by the load it causes.
    """
    known: Caller | None = http.scope.get(CALLER)
    if known is None:
        if http.client and not is_loopback(http.client.host):
            raise Forbidden("Without API keys only this machine may do this: ask there, or start with --api-keys.")
    elif not known.is_admin:
        raise Forbidden("This needs the API key of an administrator.")


def owner_of(http: HttpRequest) -> str | None:
    """The owner of the API key; None without one."""
    known: Caller | None = http.scope.get(CALLER)
    return known.name if known else None


def request_id_of(http: HttpRequest) -> str:
    """The id that the caller chose, if it is valid, or a random one; the same until the response is complete."""
    known: str | None = http.scope.get(_ID)
    if known is None:
        given = http.headers.get("x-request-id", "")
        known = http.scope[_ID] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return known


def _timeout(http: HttpRequest) -> float | None:
    given = http.headers.get("x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidRequest(f"X-Request-Timeout is not a number of seconds up to {MAX_TIMEOUT}: send 60, for example.")
    return seconds
