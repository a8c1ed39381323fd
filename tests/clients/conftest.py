"""Two servers for the tests of all clients: one that has room, and one whose queue is soon full."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.demo import BUNDLE as DEMO
from tests.clients.load import FullQueue
from tests.support.meeting import HeldServing
from tests.support.serving import Serving


@pytest.fixture(scope="session")
def serving(demo: HeldServing) -> HeldServing:
    """A server process over the demo's model, shared: leave it as you found it."""
    return demo


@pytest.fixture(scope="session")
def narrow() -> Iterator[Serving]:
    """A server process in which one request may wait, and which takes four times as long as it needs."""
    with Serving(DEMO, "--max-waiting", "1", "4", module="tests.support.slowed_server") as running:
        yield running


@pytest.fixture
def full_queue(narrow: Serving) -> Iterator[FullQueue]:
    """`narrow` with a request that runs and one that waits, so that it refuses all others until it is freed."""
    with FullQueue(narrow) as full:
        yield full
