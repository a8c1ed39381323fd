"""The limits of a connection, and the uvicorn configuration that takes them to the protocol."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import uvicorn

if TYPE_CHECKING:
    from server.transport.protocol import HttpProtocol

Refusal = Literal["MalformedRequest", "HeadersTooLarge", "TooSlow", "TooManyConnections", "ConnectionStopping"]
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)  # of the transport: as the metrics call them
_OTHER_FILES = 64  # descriptors for the bundle, the log, the event loop and the backend
_MOST_FILES = 65_536  # that are asked of the system


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may take, and how many there may be. Times are in seconds."""

    connections: int = 1000
    header_seconds: float = 10  # from the first byte, or from connecting, to the end of the headers
    body_seconds: float = 20  # in which a body, and the caller's reading, must make progress
    keep_alive_seconds: int = 20  # between two requests


class TransportConfig(uvicorn.Config):
    """uvicorn's configuration with our HTTP protocol, its limits, and whom it tells of requests that it refuses."""

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        limits: Limits,
        on_refusal: Callable[[Refusal], None] = lambda _reason: None,
        **options: Any,
    ) -> None:
        super().__init__(
            app,
            http="server.transport.protocol:HttpProtocol",  # by name: imported while the engines are loaded
            ws="none",
            timeout_keep_alive=limits.keep_alive_seconds,
            **options,
        )
        self.limits = limits
        self.on_refusal = on_refusal
        self.idle: dict[HttpProtocol, None] = {}  # connections without a request, the longest idle first


def fit_descriptors(connections: int) -> int:
    """Allow this process the descriptors for so many connections; return how many it can have.

    Beyond them `accept` would fail, and libuv would close the listener.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    wanted = min(connections + _OTHER_FILES, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return connections if soft == resource.RLIM_INFINITY else max(min(connections, soft - _OTHER_FILES), 1)
