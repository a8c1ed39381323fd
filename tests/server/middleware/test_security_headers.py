"""Headers of every answer."""

from __future__ import annotations

import pytest

from server.middleware.security_headers import SecurityHeaders
from tests.support.asgi import answering, call


def headers(**given: str) -> dict[str, str]:
    app = SecurityHeaders(
        answering(lambda _request: {}, {name.replace("_", "-"): text for name, text in given.items()})
    )
    return dict(call(app, "GET", "/").headers)


def test_an_answer_is_kept_by_nobody_framed_by_nobody_and_runs_nothing() -> None:
    assert (
        headers().items()
        >= {
            "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }.items()
    )


@pytest.mark.parametrize("name", ["content-security-policy", "cache-control", "referrer-policy"])
def test_what_an_answer_sets_itself_stays(name: str) -> None:
    assert headers(**{name: "its own"})[name] == "its own"


def test_files_are_revalidated() -> None:
    assert headers(etag='"7"')["cache-control"] == "no-cache"
