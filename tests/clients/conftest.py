"""One server for the tests of all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE as DEMO
from tests.support.serving import Serving


@pytest.fixture(scope="session")
def serving() -> Iterator[Serving]:
    """A server process over the demo's model, shared: leave it as you found it."""
    with Serving(DEMO) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200, "a test left the server not ready"
