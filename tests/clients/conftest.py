"""Two servers for the tests of all clients: one that has room, and one whose queue is soon full."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE as DEMO
from tests.clients.load import FullQueue
from tests.support.meeting import HeldServing


@pytest.fixture(scope="session")
def serving(demo: HeldServing) -> HeldServing:
    """A server process over the demo's model, shared: leave it as you found it."""
    return demo


@pytest.fixture(scope="session")
def narrow() -> Iterator[HeldServing]:
    """A server process in which one request may wait."""
    with HeldServing(DEMO, "--max-waiting", "1") as running:
        yield running


@pytest.fixture
def full_queue(narrow: HeldServing) -> Iterator[FullQueue]:
    """`narrow` with a request that runs and one that waits, so that it refuses all others until it is freed."""
    with FullQueue(narrow) as full:
        yield full
