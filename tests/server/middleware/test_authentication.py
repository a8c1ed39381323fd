"""Who is let in."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount

from server.api.error_responses import error_response
from server.app import routes
from server.middleware.authentication import CALLER, Authentication, is_open
from server.middleware.cross_origin import allow_origins
from server.middleware.paths import Paths
from server.requests.context import Caller
from tests.support.asgi import answering, call

CALLERS = {"right": Caller("me"), "admins": Caller("boss", is_admin=True)}
BASIC = "Basic " + base64.b64encode(b"anyone:right").decode()
OPEN = {"/", "/docs", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready"}
OPEN_FILES = {"/docs/swagger-ui.css", "/playground/main.js"}


def app(**options: Any) -> Authentication:
    told = answering(lambda request: {"caller": getattr(request.scope.get(CALLER), "name", None)})
    return Authentication(told, find=CALLERS.get, refuse=error_response, **options)


def ask(path: str = "/generate", method: str = "POST", root_path: str = "", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return call(Paths(app()), method, path, root_path=root_path, headers=named)


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer right"}, {"Authorization": BASIC}, {"X_API_Key": "right"}]
)
def test_the_caller_of_a_key_is_known_to_the_routes(headers: Mapping[str, str]) -> None:
    assert ask(**headers).json() == {"caller": "me"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}])
def test_others_are_refused_in_the_shape_of_the_api(headers: Mapping[str, str]) -> None:
    own, openai, sdapi = (ask(path, **headers) for path in ("/generate", "/v1/images/generations", "/sdapi/v1/txt2img"))
    assert [answer.status_code for answer in (own, openai, sdapi)] == [401] * 3
    assert own.headers["Content-Type"] == "application/problem+json"
    assert own.json()["title"] == "Unauthenticated"
    assert openai.json()["error"]["message"] == sdapi.json()["detail"] == own.json()["detail"]
    assert "wrong" not in own.text.replace("wrong API key", "")
    assert own.headers.get_list("WWW-Authenticate") == ['Bearer realm="latentd"']
    assert sdapi.headers.get_list("WWW-Authenticate")[0].startswith("Basic ")


@pytest.mark.parametrize(
    "path", ["/generate/", "/nowhere", "/v1/models", "/jobs/7", "/v2/models/x", "/metrics", "/v20"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT"])
def test_every_path_and_method_asks_for_a_key(path: str, method: str) -> None:
    assert ask(path, method).status_code == 401


@pytest.mark.parametrize("path", ["/../generate", "/docs/../generate", "//generate", "/openapi.json/x", "/v2/x"])
def test_what_only_looks_open_is_not(path: str) -> None:
    route = httpx.URL(f"http://here{path}").path
    assert is_open(route) == route.startswith("/docs/")  # whose files are all that is below it


@pytest.mark.parametrize("root", ["", "/images"])
def test_open_paths_are_those_of_the_page_the_description_and_probes(root: str) -> None:
    for path in OPEN | OPEN_FILES:
        assert ask(path, "GET", root_path=root).status_code == 200, path
    assert ask("/images/generate", "GET", root_path="/images").status_code == 401, "the proxy keeps the prefix"


def test_nothing_else_of_the_application_is_open() -> None:
    application: FastAPI = routes(MagicMock())
    found = iter_route_contexts(application.routes)
    paths = {f"{one.path}/" if isinstance(one.original_route, Mount) else one.path for one in found if one.path}
    assert {"/generate", "/metrics", "/docs/", "/v2/health/live"} <= paths
    assert {path for path in paths if is_open(path)} <= OPEN | {"/docs/", "/playground/"}


def test_metrics_need_an_administrators_key() -> None:
    refused = ask("/metrics", "GET", X_API_Key="right")
    assert (refused.status_code, refused.json()["title"]) == (403, "Forbidden")
    assert "WWW-Authenticate" not in refused.headers
    assert ask("/metrics", "HEAD", X_API_Key="admins").status_code == 200


def test_wrong_keys_from_one_address_are_limited_and_right_ones_pass() -> None:
    application = app()
    statuses = [call(application, "GET", "/x", headers={"X-API-Key": str(number)}).status_code for number in range(40)]
    assert set(statuses[:20]) == {401}
    assert set(statuses[20:]) == {429}
    refused = call(application, "GET", "/x", headers={"X-API-Key": "another"})
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert call(application, "GET", "/x", headers={"X-API-Key": "right"}).status_code == 200
    assert call(application, "GET", "/x").status_code == 401, "no key is no wrong key"


def test_a_preflight_has_no_key_and_allows_its_header() -> None:
    published = allow_origins(Paths(app()), ["https://app.example"])
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-api-key"}
    preflight = call(published, "OPTIONS", "/generate", headers={"Origin": "https://app.example", **asked})
    assert preflight.status_code == 200
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
    assert "authorization" in allowed
    assert "x-api-key" in allowed
    refused = call(published, "POST", "/generate", headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://app.example", "so that its script can read it"
