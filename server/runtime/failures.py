"""What callers are told when their requests do not end with images; what operators need to know is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.errors import DeviceLost, EngineError
from server.requests.errors import NotReady, ServerStopping, StepFailed
from server.requests.request import Failed, Request

_log = logging.getLogger(__name__)
_RETRY_AFTER = 5  # seconds, in which another server is asked, or this one has started again


class StartStopped(EngineError):
    """The server was told to stop before it was ready."""


def stopping() -> Failed:
    error = ServerStopping("The server stopped before this image was done: ask another one.", retry_after=_RETRY_AFTER)
    return Failed(error)


def left(request: Request, *, server_stops: bool) -> Failed:
    """The outcome of a request that was cancelled, whether by its caller, its time limit or a stop of the server."""
    reason = request.cancelled
    return stopping() if server_stops or reason is None else Failed(reason)


def after_fault() -> Failed:
    return Failed(NotReady("The server is stopping after a fault: ask another one.", retry_after=_RETRY_AFTER))


@contextmanager
def contained(fail: Callable[[Exception], None]) -> Iterator[None]:
    """Hand any exception of the body to `fail`. Raises DeviceLost: that is no request's fault."""
    try:
        yield
    except DeviceLost:
        raise
    except Exception as error:
        fail(error)


def failed(error: Exception, ids: str) -> Failed:
    """The outcome of the requests `ids`, whose call raised `error`; it is the cause of what callers are told."""
    if isinstance(error, EngineError):
        _log.error("the engine failed for %s: %s", ids, error, extra={"fields": {"request_id": ids}})
        failure = StepFailed("The engine failed while this image was made: try again.")
    else:
        _log.error("an unexpected error ended %s", ids, exc_info=error, extra={"fields": {"request_id": ids}})
        failure = StepFailed("An unexpected error ended this request, which the server's log describes: try again.")
    forget_tracebacks(error)
    failure.__cause__ = error
    return Failed(failure)


def forget_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of `error` and its causes. Errors are kept, and with their frames memory of the device."""
    while error:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
