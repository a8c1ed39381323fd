"""One request and its response: what becomes of the connection when the response is complete."""

from __future__ import annotations

from uvicorn._types import ASGISendEvent, HTTPResponseStartEvent
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_DISCARDED = 34 * 1024 * 1024  # bytes of an announced body that are read and discarded after a refusal
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b"3\r\n:\n\n\r\n"  # a server-sent comment, as one chunk


class Cycle(RequestResponseCycle):
    """A cycle of uvicorn's that closes the connection after a response to an incomplete request.

    A short body of known length is read to its end instead, so that the connection can be used again, and so that
    callers which send all of it before they read see the response.
    """

    announced: int | None = None  # bytes of the body; None: chunked
    lingers = False  # the response is complete, the request is not, and the connection is to be closed
    probe = b""  # bytes that change nothing for the caller, whatever it waits for

    def prepare(self) -> None:
        """Set what follows from the request's head."""
        lengths = [value for name, value in self.scope["headers"] if name == b"content-length"]
        chunked = any(name == b"transfer-encoding" for name, _ in self.scope["headers"])
        self.announced = None if chunked else int(lengths[0]) if lengths else 0
        if self.scope["http_version"] == "1.0":
            self.waiting_for_100_continue = False
        else:
            self.probe = _CONTINUE

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
        elif message["type"] == "http.response.body" and not message.get("more_body", False) and self.more_body:
            self.lingers, self.keep_alive = not self.keep_alive, True  # uvicorn would close, and reset, at once
        await super().send(message)

    def _start(self, message: HTTPResponseStartEvent) -> None:
        if self.more_body and not self._discards:
            self.keep_alive = False
        kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
        self.probe = _COMMENT if kinds and kinds[0].startswith(b"text/event-stream") else b""

    @property
    def _discards(self) -> bool:
        unasked = self.waiting_for_100_continue  # it may never be sent
        return self.announced is not None and self.announced <= _DISCARDED and not unasked
