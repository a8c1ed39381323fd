"""HTTP/1.1 as uvicorn and httptools speak it, with bounds on the bytes and the time that a caller may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Literal, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.middleware.security_headers import completed
from server.transport.cycle import Cycle
from server.transport.limits import Refusal, TransportConfig

MAX_HEAD = 64 * 1024  # bytes of the request line and the headers, or of what frames a body
MAX_HEADERS = 100
_RATE = 1024  # bytes per second: callers who send or read more slowly are disconnected
_LINGER_SECONDS = 1.0  # between our end of a connection and its reset, so that the caller can read the response
_DRAIN_SECONDS = 2.0  # in which callers must read on while the server stops
_OLD_GRACE = 1.0  # seconds for the response to an HTTP/1.0 caller that has closed its end
_FIRST_PROBE, _LAST_PROBE = 0.2, 5.0  # seconds between probes, doubled each time; a quick response comes before them
_STATUS: Mapping[Refusal, HTTPStatus] = {
    "MalformedRequest": HTTPStatus.BAD_REQUEST,
    "HeadersTooLarge": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "TooSlow": HTTPStatus.REQUEST_TIMEOUT,
    "TooManyConnections": HTTPStatus.SERVICE_UNAVAILABLE,
    "ConnectionStopping": HTTPStatus.SERVICE_UNAVAILABLE,
}


class HttpProtocol(HttpToolsProtocol):
    """A connection. Each of its states has a time limit; offers to upgrade are ignored."""

    def __init__(
        self,
        config: TransportConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._on_refusal = config.on_refusal
        self._idle = config.idle
        self._receiving: Literal["nothing", "head", "body"] = "head"
        self._watched: Literal["nothing", "head", "body"] = "nothing"  # by `_receive_timer`
        self._receive_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # since the last progress
        self._body_bytes = 0
        self._progressed = False
        self._objection: Refusal = "MalformedRequest"  # to what the parser does not accept
        self._refused = False
        self._upgrade_head = b""  # the head without the offered upgrade
        self._half_closed = False
        self._send_seconds = self._limits.body_seconds

    # Connecting and leaving

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_receiving()
        if len(self.connections) > self._limits.connections:
            self._make_room()
        if not self._refused:
            self._idle[self] = None

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest, or this one where none is."""
        if not self._idle:
            self._refuse("TooManyConnections", "Too many connections: try again soon.")
            return
        oldest = next(iter(self._idle))
        del self._idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        for timer in (self._receive_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._half_closed = False
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Refuse what is not yet complete, and wait less long for callers who do not read."""
        self._send_seconds = _DRAIN_SECONDS
        if self._answering and self.cycle.more_body:
            self._refuse("ConnectionStopping", "The server is shutting down: send the request to another.")
        super().shutdown()
        if self.flow.write_paused or self.transport.is_closing():
            self._watch_sending()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Receiving

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._receiving == "nothing":
            self._receiving = "head"
        while data and not self._refused:
            room = len(data) if self._receiving == "body" else MAX_HEAD - self._head_bytes
            self._feed(data[:room])
            data = data[room:]
        self._watch_receiving()

    def _feed(self, data: bytes) -> None:
        self._progressed = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrade_head:
                self._parse_again(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._objection, "The request is not valid HTTP/1.1, or its headers are too large.")
        self._head_bytes = 0 if self._progressed else self._head_bytes + len(data)
        if self._head_bytes >= MAX_HEAD:
            self._refuse("HeadersTooLarge", f"Send at most {MAX_HEAD} bytes of headers, and values in the body.")

    def _parse_again(self, rest: bytes) -> None:
        """Parse the request as if no upgrade had been offered; `rest` is what followed its head."""
        self.parser = httptools.HttpRequestParser(self)
        head, self._upgrade_head = self._upgrade_head, b""
        self._feed(head + rest)

    def on_message_begin(self) -> None:
        self._receiving = "head"
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving == "body":
            return  # a trailer
        if len(self.headers) >= MAX_HEADERS:
            self._objection = "HeadersTooLarge"
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._progressed = True
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrade_head = self._without_upgrade()
            return
        super().on_headers_complete()
        self._receiving, self._body_bytes = "body", 0
        self._idle.pop(self, None)
        self.cycle.__class__ = Cycle  # uvicorn has no other way to choose it; its task has not begun
        cast(Cycle, self.cycle).prepare()

    def _without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_body(self, body: bytes) -> None:
        self._progressed = True
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progressed = True
        if not self._upgrade_head:
            self._receiving = "nothing"
            super().on_message_complete()

    def _watch_receiving(self) -> None:
        """Start the timer of what is being received."""
        if self._receiving == self._watched:
            return
        self._stop_watching()
        if self._refused:
            return
        self._watched = self._receiving
        if self._receiving == "head":
            self._receive_timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)
        elif self._receiving == "body":
            self._receive_timer = self.loop.call_later(self._limits.body_seconds, self._check_body, self._body_bytes)

    def _stop_watching(self) -> None:
        self._watched = "nothing"
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _head_is_late(self) -> None:
        self._stop_watching()
        if self._answering:  # more than a line break after the request will be noticed after the response
            return
        if self._head_bytes or self.cycle is not None:
            self._refuse("TooSlow", "The headers took too long: send them at once.")
        else:
            self._close()

    def _check_body(self, bytes_before: int) -> None:
        self._stop_watching()
        enough = self._body_bytes - bytes_before >= _RATE * self._limits.body_seconds
        if enough or self.flow.read_paused:
            self._watch_receiving()
        else:
            self._refuse("TooSlow", f"The body took too long: send at least {_RATE} bytes a second.")

    # Responding

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._idle[self] = None
        if cast(Cycle, self.cycle).lingers:
            self._linger()
        elif self._half_closed and not self._answering:
            self._close()
        elif self.transport.is_closing():
            self._watch_sending()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_watching_sending()

    def _watch_sending(self) -> None:
        """Disconnect a caller who reads too slowly."""
        self._stop_watching_sending()
        unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self._send_seconds, self._check_sending, unsent)

    def _stop_watching_sending(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _check_sending(self, unsent_before: int) -> None:
        sent = unsent_before - self.transport.get_write_buffer_size()
        if sent < _RATE * self._send_seconds:
            self.transport.abort()
        else:
            self._watch_sending()

    def _refuse(self, reason: Refusal, detail: str) -> None:
        """Answer with problem details in place of the application, and close."""
        if self._refused:
            return
        self._refused = True
        self._stop_watching()
        if self._answering and (self.cycle.response_started or self.pipeline):
            self.transport.abort()
            return
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._on_refusal(reason)
        self.transport.write(_problem(_STATUS[reason], detail, self.server_state.default_headers))
        self._linger()

    def _linger(self) -> None:
        """Close our end; then the connection, which resets it if the caller is still sending."""
        self._unset_keepalive_if_required()
        self._stop_watching()
        self._refused = True
        self.flow.pause_reading()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self._stop_watching_sending()
        self._send_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
            self._watch_sending()

    # Callers that close their end

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on where the request is complete: its caller may have closed its end only, or be gone.

        Both look the same. The kernel of one that is gone refuses what we send, which the next write finds out.
        """
        if not self._answering or self.cycle.more_body or self._refused:
            return False
        self._half_closed = True
        self.loop.call_later(_FIRST_PROBE, self._probe, _FIRST_PROBE)
        return True

    def _probe(self, delay: float) -> None:
        if not self._half_closed or not self._answering or self.transport.is_closing():
            return
        cycle = cast(Cycle, self.cycle)
        if cycle.scope["http_version"] == "1.0" and not cycle.response_started:
            self.loop.call_later(_OLD_GRACE, self._leave_old)
            return
        if cycle.probe and not self.pipeline and not self.flow.write_paused:
            self.transport.write(cycle.probe)
        self.loop.call_later(delay, self._probe, min(2 * delay, _LAST_PROBE))

    def _leave_old(self) -> None:
        """HTTP/1.0 has nothing to probe with, and behind most proxies that speak it the caller is gone."""
        if self._answering and not self.cycle.response_started:
            self.transport.abort()
        else:
            self._probe(_FIRST_PROBE)


def _problem(status: HTTPStatus, detail: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An answer of problem details with `headers` and those of every answer, after which the connection is closed."""
    document = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail, "errors": []}
    body = json.dumps(document).encode()
    lines = [*headers, (b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    lines.append((b"connection", b"close"))
    if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.REQUEST_TIMEOUT):
        lines.append((b"retry-after", b"1"))
    return STATUS_LINE[status] + b"".join(b"%b: %b\r\n" % line for line in completed(lines)) + b"\r\n" + body
