"""A server behind each of the proxies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE
from tests.support.meeting import HeldServing
from tests.support.proxies import PROXIES, proxied

BEHIND = ("--root-path", "/images", "--allowed-hosts", "images.example.com")  # what the configurations ask for
TRUSTED = "127.0.0.1,127.0.0.3"  # the address of the proxies, and another


@pytest.fixture(scope="session")
def upstream() -> Iterator[HeldServing]:
    """A server as the configurations expect it, with the access log."""
    with HeldServing(BUNDLE, *BEHIND, "--trusted-proxies", TRUSTED, "--access-log") as running:
        yield running


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, upstream: HeldServing, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of each proxy, for both of whose servers stands `upstream`."""
    with proxied(request.param, tmp_path_factory.mktemp(request.param), upstream.url) as url:
        yield url
