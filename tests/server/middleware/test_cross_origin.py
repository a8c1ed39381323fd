"""What pages of other origins may do."""

from __future__ import annotations

import httpx
import pytest

from server.middleware.cross_origin import TRUSTED, allow_origins
from tests.support.asgi import call, scope_teller

OURS, THEIRS = "https://app.example", "https://other.example"


def ask(origins: tuple[str, ...], origin: str | None = None) -> httpx.Response:
    return call(
        allow_origins(scope_teller(TRUSTED), origins), "POST", "/", headers={"Origin": origin} if origin else {}
    )


def preflight(origins: tuple[str, ...], origin: str) -> httpx.Response:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-request-id"}
    app = allow_origins(scope_teller(), origins)
    return call(app, "OPTIONS", "/generate", headers={"Origin": origin, **wanted})


@pytest.mark.parametrize(
    ("origins", "origin", "allowed", "trusted"),
    [
        ((), OURS, None, None),
        ((OURS,), OURS, OURS, True),
        ((OURS,), THEIRS, None, None),
        ((OURS,), None, None, None),
        (("*",), THEIRS, "*", True),
        ((OURS, THEIRS), THEIRS, THEIRS, True),
    ],
)
def test_only_allowed_origins_read_answers_and_may_send_forms(
    origins: tuple[str, ...], origin: str | None, allowed: str | None, trusted: bool | None
) -> None:
    answer = ask(origins, origin)
    assert answer.headers.get("Access-Control-Allow-Origin") == allowed
    assert answer.json() == {TRUSTED: trusted}
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_preflight_allows_the_headers_of_a_request() -> None:
    answer = preflight((OURS,), OURS)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == OURS
    assert "x-request-id" in answer.headers["Access-Control-Allow-Headers"]
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]


def test_a_preflight_from_elsewhere_is_refused() -> None:
    assert preflight((OURS,), THEIRS).status_code == 400


def test_scripts_may_read_the_headers_with_facts() -> None:
    exposed = ask((OURS,), OURS).headers["Access-Control-Expose-Headers"]
    assert {"X-Seed", "X-Request-Id", "Retry-After"} <= set(exposed.split(", "))
