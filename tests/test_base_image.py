"""The digest of the base image, from a registry on loopback that answers as the OCI distribution specification says."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests import ROOT
from tests.tools.base_image import INDEXES, Base, PinFailed, digest_of, main

OLD = Base("python", "3.13.1-slim-trixie", f"sha256:{'0' * 64}")
SCOPE = "repository:library/python:pull"


def index(*architectures: str) -> bytes:
    platforms = [{"os": "linux", "architecture": one} for one in architectures]
    attestation = {"os": "unknown", "architecture": "unknown"}
    return json.dumps({"manifests": [{"platform": one} for one in (*platforms, attestation)]}).encode()


class Registry(http.server.ThreadingHTTPServer):
    """Manifests by path, for those with a token that its own token service gave for this scope."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.headers: dict[str, str] = {}  # added to each manifest's
        self.challenge = f'Bearer realm="{self.url}/token",service="the registry",scope="{SCOPE}"'
        self.is_open = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def has(self, tag: str, content: bytes, kind: str = INDEXES[0]) -> str:
        self.manifests[f"/v2/library/python/manifests/{tag}"] = (kind, content)
        return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if asked.path == "/token":
            known = parse_qs(asked.query) == {"service": ["the registry"], "scope": [SCOPE]}
            self.answer(200 if known else 400, json.dumps({"token": "granted"}).encode())
        elif not self.server.is_open and self.headers["Authorization"] != "Bearer granted":
            self.answer(401, b"{}", {"WWW-Authenticate": self.server.challenge})
        elif found := self.server.manifests.get(asked.path):
            kind, content = found
            wanted = kind if kind in self.headers["Accept"] else "application/vnd.oci.image.manifest.v1+json"
            self.answer(200, content, {"Content-Type": wanted, **self.server.headers})
        else:
            self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def dockerfile(tmp_path: Path) -> Path:
    path = tmp_path / "Dockerfile"
    path.write_text(f"# Neither {OLD.tag} of a comment\nARG BASE={OLD}\nFROM ${{BASE}} AS base\n", encoding="utf-8")
    return path


def pin(registry: Registry, dockerfile: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr("sys.argv", ["base-image", registry.url, "--dockerfile", str(dockerfile), *more])
    return main()


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "wants a token"])
def test_the_digest_is_that_of_the_index(registry: Registry, kind: str, is_open: bool) -> None:
    registry.is_open = is_open
    digest = registry.has(OLD.tag, index("amd64", "arm64", "riscv64"), kind)
    assert digest_of(registry.url, OLD) == digest
    registry.headers = {"Docker-Content-Digest": digest}
    assert digest_of(registry.url, OLD) == digest


def test_the_dockerfile_is_rewritten_once(
    registry: Registry, dockerfile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest, before = registry.has(OLD.tag, index("amd64", "arm64")), dockerfile.read_text(encoding="utf-8")
    assert pin(registry, dockerfile, monkeypatch, "--check") == 1
    assert dockerfile.read_text(encoding="utf-8") == before
    assert pin(registry, dockerfile, monkeypatch) == 0
    assert dockerfile.read_text(encoding="utf-8") == before.replace(OLD.digest, digest)
    assert pin(registry, dockerfile, monkeypatch, "--check") == 0
    assert capsys.readouterr().out.endswith("is up to date\n")


def test_another_tag(registry: Registry, dockerfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = registry.has("3.13.2-slim-trixie", index("amd64", "arm64"))
    assert pin(registry, dockerfile, monkeypatch, "--tag", "3.13.2-slim-trixie") == 0
    assert Base.of(dockerfile.read_text(encoding="utf-8")) == Base("python", "3.13.2-slim-trixie", digest)


def test_what_cannot_be_pinned_changes_nothing(
    registry: Registry, dockerfile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dockerfile.read_text(encoding="utf-8")
    assert pin(registry, dockerfile, monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {registry.url} has no python:{OLD.tag}: name a tag that it has\n"
    assert dockerfile.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (index("amd64"), INDEXES[0], "the image lacks arm64"),
        (index("amd64", "arm64"), "application/vnd.oci.image.manifest.v1+json", "no index of architectures"),
    ],
)
def test_one_architecture_is_not_enough(registry: Registry, content: bytes, kind: str, message: str) -> None:
    registry.has(OLD.tag, content, kind)
    with pytest.raises(PinFailed, match=message):
        digest_of(registry.url, OLD)


def test_a_registry_that_contradicts_itself(registry: Registry) -> None:
    registry.has(OLD.tag, index("amd64", "arm64"))
    registry.headers = {"Docker-Content-Digest": OLD.digest}
    with pytest.raises(PinFailed, match="the registry calls it"):
        digest_of(registry.url, OLD)


def test_a_registry_with_passwords(registry: Registry) -> None:
    registry.challenge = 'Basic realm="ours"'
    with pytest.raises(PinFailed, match="credentials of the kind Basic"):
        digest_of(registry.url, OLD)


def test_no_registry() -> None:
    with pytest.raises(PinFailed, match="does not answer"):
        digest_of("http://127.0.0.1:1", OLD)


def test_the_dockerfile_has_a_line_to_update() -> None:
    assert Base.of((ROOT / "Dockerfile").read_text(encoding="utf-8")).name == "python"
