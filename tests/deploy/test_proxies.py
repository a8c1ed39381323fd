"""A real server behind the real nginx, Caddy and Envoy, with the configurations of deploy/."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import PIL.Image
import pytest
from playwright.sync_api import Browser

from tests.page.driving import generate
from tests.support.bare_server import wait_until
from tests.support.browsing import Console, browsing
from tests.support.meeting import HeldServing
from tests.support.ports import free_ports
from tests.support.proxies import PROXIES, check, proxied
from tests.support.serving import Serving

MIB = 1024 * 1024
EVENTS = {"Accept": "text/event-stream"}
SHORT = {"prompt": "a red heart", "num_inference_steps": 2, "seed": 1}
LONG: dict[str, Any] = {"prompt": "a red heart", "num_inference_steps": 20, "seed": 1}
SPOOFED = {"X-Forwarded-For": "127.0.0.1, 203.0.113.9"}
PREFIXES = ["", "/images"]
at_each_path = pytest.mark.parametrize("prefix", PREFIXES)


@pytest.fixture
def client(proxy: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """No longer than the module: while it lives, asyncio.run refuses to run."""
    with browsing() as running:
        yield running


def names(answer: httpx.Response) -> Iterator[str]:
    """The names of the events, as they arrive."""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            yield line.removeprefix("event: ")


def running(upstream: Serving) -> float:
    return upstream.metrics()["latentd_requests_running"]


def cancelled(upstream: Serving) -> float:
    return upstream.total("latentd_requests_total", outcome="cancelled")


@pytest.mark.parametrize("name", PROXIES)
def test_the_configuration_is_valid_as_it_is(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@at_each_path
def test_an_image_is_passed_on(client: httpx.Client, prefix: str) -> None:
    answer = client.post(f"{prefix}/generate", json=SHORT, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (64, 64)
    assert answer.headers["X-Seed"] == "1"


@at_each_path
def test_events_arrive_while_the_server_works(client: httpx.Client, upstream: HeldServing, prefix: str) -> None:
    """The first ones come, or this waits for ever, while the server takes no further step."""
    with upstream.held(), client.stream("POST", f"{prefix}/generate", json=LONG, headers=EVENTS) as answer:
        upstream.let(2)
        found = names(answer)
        assert [next(found) for _ in range(3)] == ["queued", "started", "step"]
        assert running(upstream) == 1
        upstream.let(LONG["num_inference_steps"])
        assert list(found)[-1] == "completed"


def test_who_leaves_a_stream_cancels_the_request(client: httpx.Client, upstream: HeldServing) -> None:
    before = cancelled(upstream)
    with upstream.held():
        with client.stream("POST", "/generate", json=LONG, headers=EVENTS) as answer:
            next(names(answer))
        wait_until(lambda: cancelled(upstream) == before + 1)


def test_who_waits_for_an_image_and_leaves_cancels_the_request(proxy: str, upstream: HeldServing) -> None:
    before, address = cancelled(upstream), urlsplit(proxy)
    with upstream.held():
        with closing(HTTPConnection(address.hostname or "", address.port)) as leaving:
            leaving.request("POST", "/generate", json.dumps(LONG), {"Content-Type": "application/json"})
            upstream.wait_for(1)
        wait_until(lambda: cancelled(upstream) == before + 1)


def test_a_body_of_thirty_mebibytes_reaches_the_server(client: httpx.Client) -> None:
    answer = client.post("/generate", data={"prompt": "a red heart"}, files={"image": bytes(30 * MIB)})
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["field"] == "image"


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    answer = client.post("/generate", content=bytes(36 * MIB), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_the_api_description_works_below_a_path(client: httpx.Client) -> None:
    answer = client.get("/images/docs")
    assert answer.status_code == 200
    links = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert links
    for link in [*links, "openapi.json"]:
        assert client.get(str(answer.url.join(link))).status_code == 200, link
    assert client.get("/images/openapi.json").json()["servers"][0]["url"] == "/images"


def test_the_page_works_below_a_path(proxy: str, browser: Browser) -> None:
    page, console = browser.new_page(reduced_motion="reduce"), Console()
    console.watch(page)
    page.goto(f"{proxy}/images/")
    generate(page)
    page.close()
    assert console.unexpected() == []


def test_a_path_without_its_slash_leads_to_the_page(client: httpx.Client) -> None:
    answer = client.get("/images", follow_redirects=True)
    assert answer.url.path == "/images/"
    assert "<title>" in answer.text


def logged_caller(upstream: Serving, url: str, address: str, headers: dict[str, str]) -> str:
    """Who asked, as the access log says, for a request that `address` sends to `url`."""
    name = f"/not-there-{len(upstream.stderr)}"
    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address=address)) as client:
        assert client.get(name, headers=headers).status_code == 404
    assert upstream.logged(name)
    (line,) = [line for line in upstream.stderr if name in line]
    (found,) = re.findall(r"\d+\.\d+\.\d+\.\d+", line)
    return str(found)


@pytest.mark.parametrize("headers", [{}, SPOOFED], ids=["plain", "spoofed"])
def test_the_caller_is_who_connected_to_the_proxy(proxy: str, upstream: Serving, headers: dict[str, str]) -> None:
    assert logged_caller(upstream, proxy, "127.0.0.2", headers) == "127.0.0.2"


@pytest.mark.parametrize(("address", "caller"), [("127.0.0.3", "203.0.113.9"), ("127.0.0.4", "127.0.0.4")])
def test_only_a_trusted_proxy_is_believed_who_the_caller_is(upstream: Serving, address: str, caller: str) -> None:
    assert logged_caller(upstream, upstream.url, address, SPOOFED) == caller


@pytest.mark.parametrize(("host", "ready"), [("images.example.com", True), ("rebound.example.net", False)])
def test_the_server_checks_the_host_that_was_asked_for(client: httpx.Client, host: str, ready: bool) -> None:
    answer = client.get("/models", headers={"Host": host})
    assert answer.status_code == (200 if ready else 421)
    assert answer.json()


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/images/metrics"])
def test_metrics_are_not_published(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", PROXIES)
def test_a_request_that_one_server_refuses_goes_to_the_other(name: str, upstream: Serving, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with proxied(name, tmp_path, nobody, upstream.url) as url, httpx.Client(base_url=url, timeout=120) as client:
        assert [client.post("/generate", json=SHORT).status_code for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("name", PROXIES)
def test_without_a_server_the_answer_says_when_to_ask_again(name: str, tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with proxied(name, tmp_path, nobody) as url:
        answer = httpx.post(f"{url}/generate", json=SHORT)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"].startswith("No server is available")
