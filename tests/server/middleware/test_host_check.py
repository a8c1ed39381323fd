"""Requests that a browser sends for another host."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from server.access.hosts import Hosts
from server.api.error_responses import error_response
from server.middleware.host_check import HostCheck
from tests.support.asgi import answering, call

APP = HostCheck(answering(lambda _request: {}), hosts=Hosts({"images.example.com"}), refuse=error_response)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("images.example.com", 200), ("evil.example", 421), ("<script>", 421), ("", 421)],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_only_hosts_of_this_server_are_answered(host: str, status: int, method: str) -> None:
    assert call(APP, method, "/", headers={"Host": host}).status_code == status


def test_the_refusal_names_the_setting_and_the_host() -> None:
    refused = call(APP, "GET", "/generate", headers={"Host": "evil.example"}).json()
    assert refused["title"] == "Unknown host"
    assert "--allowed-hosts evil.example" in refused["detail"]
    assert "script" not in call(APP, "GET", "/", headers={"Host": "<script>"}).text
    openai = call(APP, "GET", "/v1/models", headers={"Host": "evil.example"})
    assert "--allowed-hosts" in openai.json()["error"]["message"]


def test_what_a_proxy_was_asked_for_does_not_count() -> None:
    headers = {"Host": "evil.example", "X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
    assert call(APP, "GET", "/", headers=headers).status_code == 421


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [("1.1", [], 421), ("1.0", [], 200), ("1.1", ["localhost"] * 2, 421), ("1.0", ["localhost", "evil.example"], 421)],
)
def test_a_host_is_sent_once(version: str, hosts: list[str], status: int) -> None:
    assert status_of(version, [(b"host", host.encode()) for host in hosts]) == status


def status_of(version: str, headers: list[tuple[bytes, bytes]]) -> int:
    scope: dict[str, Any] = {"type": "http", "http_version": version, "method": "GET", "path": "/", "headers": headers}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    asyncio.run(APP(scope, receive, send))
    status: int = sent[0]["status"]
    return status
