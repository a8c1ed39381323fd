"""One line for every request."""

from __future__ import annotations

import re

import pytest
from starlette.types import Receive, Scope, Send

from server.middleware.access_log import LOGGER, AccessLog
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
