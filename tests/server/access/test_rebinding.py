"""Pages whose own name is made to lead to this machine (DNS rebinding), and servers for other machines."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE as DEMO
from tests.support.bare_server import read_all
from tests.support.serving import Serving, run_server

BODY = json.dumps({"prompt": "a red heart", "num_inference_steps": 1})


@pytest.fixture(scope="module")
def local() -> Iterator[Serving]:
    with Serving(DEMO, "--allowed-hosts", "images.example.com, *.lan") as running:
        yield running


def ask(serving: Serving, path: str, *lines: str, version: str = "1.1") -> tuple[int, str]:
    """Status and body of an answer to a browser that took `serving` for what the lines say."""
    address = serving.client.base_url.host, serving.client.base_url.port
    verb, body = ("POST", BODY) if path == "/generate" else ("GET", "")
    head = [f"{verb} {path} HTTP/{version}", *lines, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall("\r\n".join([*head, "Connection: close", "", body]).encode())
        answer = read_all(connection)
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode("latin-1")


@pytest.mark.parametrize("path", ["/", "/generate", "/metrics", "/v2/health/live", "/openapi.json", "/nowhere"])
def test_a_page_of_another_name_reads_nothing(local: Serving, path: str) -> None:
    status, body = ask(local, path, f"Host: evil.example:{local.client.base_url.port}")
    assert status == 421
    assert "--allowed-hosts" in body
    assert "evil.example" in body


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Host: localhost", "Host: evil.example"),
        ("Host: evil.example", "X-Forwarded-Host: localhost"),
        ("Host: evil.example", "X-Forwarded-For: 127.0.0.1"),
        ("Host: localhost@evil.example",),
        ("Host:",),
    ],
)
def test_a_host_that_is_odd_is_refused(local: Serving, lines: tuple[str, ...]) -> None:
    assert ask(local, "/generate", *lines)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "images.example.com", "pc.lan:80"])
def test_this_machine_and_its_names_are_answered(local: Serving, host: str) -> None:
    assert ask(local, "/generate", f"Host: {host}")[0] == 200


def test_http_1_0_needs_no_host(local: Serving) -> None:
    assert ask(local, "/v2/health/live", version="1.0")[0] == 200


def test_refusals_are_counted(local: Serving) -> None:
    name = 'latentd_requests_rejected_total{reason="UnknownHost"}'
    before = local.metrics()[name]
    ask(local, "/", "Host: evil.example")
    assert local.metrics()[name] == before + 1


def test_a_server_for_other_machines_without_keys_warns_once_and_takes_any_host() -> None:
    with Serving(DEMO, "--host", "0.0.0.0") as running:  # noqa: S104 - what is tested
        assert ask(running, "/v2/health/live", "Host: evil.example")[0] == 200
        running.stop()
    (warning,) = [line for line in running.stderr if "WARNING" in line]
    assert "There are no API keys" in warning
    assert "--api-keys FILE" in warning
    assert "python -m server.access NAME --file FILE" in warning


def test_a_server_for_this_machine_does_not_warn(local: Serving) -> None:
    assert not [line for line in local.stderr if "WARNING" in line]


def test_a_start_with_a_file_that_is_not_there_says_what_to_do() -> None:
    ended = run_server("--api-keys", "/nowhere/keys.toml", "--port", "0")
    assert ended.returncode == 1
    assert "error: --api-keys /nowhere/keys.toml: No such file or directory; `python -m server.access" in ended.stderr
