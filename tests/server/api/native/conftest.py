"""A server over the demo's model for the tests of jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE as DEMO
from tests.support.meeting import HeldServing


@pytest.fixture(scope="module")
def demo() -> Iterator[HeldServing]:
    with HeldServing(DEMO, "--max-waiting", "4") as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200
