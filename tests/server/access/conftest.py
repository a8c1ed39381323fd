"""Keys of five callers, and a server that asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from engines.demo import BUNDLE as DEMO
from server.access import keys
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

OWN = {"hasty": 'rate = "2/hour"\n', "narrow": "concurrency = 1\n"}  # limits of their own


@pytest.fixture(scope="session")
def keyring() -> Mapping[str, str]:
    return {name: keys.new_key() for name in ("alice", "bob", "boss", "hasty", "narrow")}


@pytest.fixture(scope="session")
def key_file(keyring: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    entries = [keys.entry(name, key, admin=name == "boss") + OWN.get(name, "") for name, key in keyring.items()]
    path.write_text("\n".join(entries))
    return path


@pytest.fixture(scope="session")
def keyed(key_file: Path, keyring: Mapping[str, str]) -> Iterator[HeldServing]:
    """A server that asks for keys; its `client` is the administrator."""
    with HeldServing(DEMO, "--api-keys", str(key_file), "--log-level", "debug") as running:
        running.client.headers["Authorization"] = f"Bearer {keyring['boss']}"
        yield running
    output = "".join(running.stderr)
    assert " 200 " in output, "the access log is on"
    assert not [name for name, key in keyring.items() if key in output], "a key was logged"


def client_of(serving: Serving, key: str, *, address: str = "127.0.0.1") -> httpx.Client:
    """A client that sends `key` from `address`."""
    transport = httpx.HTTPTransport(local_address=address)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=serving.url, timeout=120, transport=transport, headers=headers)
