"""Which route a path and a method reach."""

from __future__ import annotations

import pytest

from server.middleware.paths import Paths
from tests.support.asgi import call, scope_teller

APP = Paths(scope_teller("method", "path", "root_path"))


@pytest.mark.parametrize(
    ("path", "route"),
    [("/", "/"), ("/generate", "/generate"), ("/generate/", "/generate"), ("/generate//", "/generate"), ("//", "/")],
)
@pytest.mark.parametrize("root", ["", "/images", "/tools/images"])
def test_a_trailing_slash_is_ignored(path: str, route: str, root: str) -> None:
    assert call(APP, "GET", path, root_path=root).json()["path"] == root + route


@pytest.mark.parametrize("path", ["/images/", "/images/generate", "/images/generate/", "/images/v2/health/live"])
def test_a_prefix_that_the_proxy_leaves_in_place_is_taken_off(path: str) -> None:
    seen = call(APP, "POST", path, root_path="/images").json()
    assert seen == {"method": "POST", "root_path": "/images", "path": path.rstrip("/") if path != "/images/" else path}


def test_a_route_that_begins_like_the_prefix_is_left_alone() -> None:
    assert call(APP, "GET", "/imagesque", root_path="/images").json()["path"] == "/images/imagesque"
    assert call(APP, "GET", "/images/x").json()["path"] == "/images/x"


def test_the_prefix_alone_leads_to_the_page_whose_links_are_relative() -> None:
    answer = call(APP, "GET", "/images", root_path="/images")
    assert (answer.status_code, answer.headers["Location"]) == (307, "/images/")


@pytest.mark.parametrize(("method", "seen"), [("HEAD", "GET"), ("GET", "GET"), ("POST", "POST"), ("PUT", "PUT")])
def test_head_reaches_what_get_reaches(method: str, seen: str) -> None:
    told = []

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        told.append(scope["method"])
        await scope_teller()(scope, receive, send)

    call(Paths(app), method, "/")
    assert told == [seen]
