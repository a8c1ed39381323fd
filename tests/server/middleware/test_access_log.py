"""One line for every request."""

from __future__ import annotations

import re

import pytest
from starlette.types import Receive, Scope, Send

from server.middleware.access_log import LOGGER, AccessLog, note
from tests.support.asgi import answering, call


def test_a_line_has_the_facts_and_neither_query_nor_body(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOGGER)
    call(AccessLog(answering(lambda _request: {}, {"X-Request-Id": "seven"})), "GET", "/a%0Ab?prompt=secret")
    (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert re.fullmatch(r"127\.0\.0\.1 GET /a%0Ab 200 \d+\.\d{3} s, request seven", line)


def test_a_request_that_fails_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("broken")

    caplog.set_level("INFO", LOGGER)
    with pytest.raises(RuntimeError, match="broken"):
        call(AccessLog(app), "GET", "/")
    (line,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert "GET / unanswered" in line


def test_what_the_application_notes_is_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    """Also if a middleware in between has copied the scope."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = {**scope}
        note(inner, caller="alice", api="openai")
        await answering(lambda _request: {})(inner, receive, send)

    caplog.set_level("INFO", LOGGER)
    call(AccessLog(app), "GET", "/")
    (record,) = [record for record in caplog.records if record.name == LOGGER]
    assert re.fullmatch(r"alice GET / 200 \d+\.\d{3} s, request -, api openai", record.getMessage())


def test_without_an_access_log_nothing_is_noted() -> None:
    scope: Scope = {"type": "http"}
    note(scope, api="openai")
    assert scope == {"type": "http"}
