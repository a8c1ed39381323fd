"""The whole application as a server that a proxy publishes under a path, and pages of another origin call."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from tests.support.serving import Serving

PREFIX, PARTNER = "/tools/images", "https://app.example"
GETS = ("/", "/docs", "/v2/health/live", "/v2/health/ready", "/metrics", "/models", "/schedulers", "/openapi.json")
BODY = {"prompt": "a red cat", "num_inference_steps": 1, "seed": 3}
LINK = re.compile(r"""(?:src|href)=["']([^"'#]+)["']|(?:fetch|untilGood|ask)\("([^"]+)"|\burl: ["']([^"']+)["']""")


@pytest.fixture(scope="module")
def published(bundle: Path) -> Iterator[Serving]:
    settings = ["--root-path", PREFIX, "--allowed-origins", PARTNER, "--access-log"]
    with Serving(bundle, *settings) as running:
        yield running


def lasting(answer: httpx.Response) -> dict[str, str]:
    """The headers, without those that differ from answer to answer."""
    differing = {"date", "content-length"} if "metrics" in str(answer.url) else {"date"}
    return {name: text for name, text in answer.headers.items() if name not in differing}


@pytest.mark.parametrize("path", GETS)
def test_head_has_the_headers_of_get_and_no_body(serving: Serving, path: str) -> None:
    got, asked = serving.client.get(path), serving.client.head(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert lasting(asked) == lasting(got)


@pytest.mark.parametrize("path", ["/generate", "/nowhere"])
def test_head_of_anything_else_is_refused(serving: Serving, path: str) -> None:
    assert serving.client.head(path).status_code == serving.client.get(path).status_code


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["the proxy strips the prefix", "the proxy keeps it"])
def test_all_paths_work_behind_a_proxy(published: Serving, prefix: str) -> None:
    for path in GETS:
        assert published.client.get(prefix + path).status_code == 200, path
        assert published.client.get(f"{prefix}{path}/").status_code in (200, 307), path
    for path in ("/generate", "/generate/"):
        assert published.client.post(prefix + path, json=BODY).status_code == 200


def links_of(text: str) -> list[str]:
    return [link for groups in LINK.findall(text) for link in groups if link and not link.startswith("data:")]


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_a_page_links_only_to_what_is_under_its_prefix_and_exists(published: Serving, page: str) -> None:
    links = set(links_of(published.client.get(page).text))
    for script in [link for link in links if link.startswith("playground/")]:
        links.update(links_of(published.client.get(f"/{script}").text))  # relative to the page, not to the script
    assert len(links) >= 4
    for link in links:
        path = urljoin(f"https://proxy.example{PREFIX}{page}", link).removeprefix("https://proxy.example")
        assert path.startswith(f"{PREFIX}/"), link
        assert published.client.get(path).status_code == (405 if path.endswith("/generate") else 200), link


def test_the_docs_page_has_one_address(published: Serving) -> None:
    answer = published.client.get("/docs/")
    assert (answer.status_code, answer.headers["Location"]) == (307, "../docs")


def test_the_description_names_the_prefix(published: Serving) -> None:
    assert published.client.get("/openapi.json").json()["servers"][0] == {"url": PREFIX}


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_a_page_may_run_its_own_scripts_and_no_others(serving: Serving, page: str) -> None:
    answer = serving.client.get(page)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert not re.search(r"<[^>]+\s(on\w+|style)=", answer.text), "attributes that the policy forbids"
    for kind in ("script", "style"):
        for content in filter(None, re.findall(rf"<{kind}\b[^>]*>(.*?)</{kind}>", answer.text, re.DOTALL)):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[f"{kind}-src"]


@pytest.mark.parametrize("path", ["/docs/swagger-ui-bundle.js", "/playground/main.js"])
def test_scripts_come_from_here_and_are_kept_after_asking(serving: Serving, path: str) -> None:
    answer = serving.client.get(path)
    assert answer.headers["Content-Type"].startswith("text/javascript")
    assert answer.headers["Cache-Control"] == "no-cache"
    again = serving.client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("path", ["", "__init__.py", "index.html", "../app.py", "..%2fapp.py", "%2fetc%2fpasswd.js"])
def test_only_scripts_and_styles_of_the_page_are_served(serving: Serving, path: str) -> None:
    assert serving.client.get(f"/playground/{path}").status_code == 404


@pytest.mark.parametrize("accept", ["application/json", "image/png"])
def test_answers_are_kept_by_nobody(serving: Serving, accept: str) -> None:
    answer = serving.client.post("/generate", json=BODY, headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_an_event_stream_still_streams(published: Serving) -> None:
    """The first event arrives before the last exists: through every middleware."""
    body = {**BODY, "num_inference_steps": 50}
    with published.client.stream("POST", "/generate", json=body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["Cache-Control"] == "no-cache"
        first = next(answer.iter_text())
    assert "event: queued" in first
    assert "event: completed" not in first


def test_a_page_of_an_allowed_origin_may_send_forms_and_read_answers(published: Serving) -> None:
    form = {name: (None, str(value)) for name, value in BODY.items()}
    answer = published.client.post("/generate", files=form, headers={"Origin": PARTNER, "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == PARTNER
    refused = published.client.post("/generate", files=form, headers={"Origin": "https://other.example"})
    assert refused.status_code == 403
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_each_request_has_a_line_in_the_access_log(published: Serving) -> None:
    published.client.post("/generate?prompt=secret", json=BODY, headers={"X-Request-Id": "line-7"})
    published.client.get("/gone-after-this")
    while not any("/gone-after-this" in line for line in published.stderr):
        published.client.get("/v2/health/live")
    (line,) = [line for line in published.stderr if "line-7" in line]
    assert re.search(rf"127\.0\.0\.1 POST {PREFIX}/generate 200 \d+\.\d+ s, request line-7, api generate$", line)
    assert not [line for line in published.stderr if "secret" in line or "red cat" in line]
