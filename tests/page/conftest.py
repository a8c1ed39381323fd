"""A browser and a server for all tests of the page, and a context of its own for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, Page

from tests.support.browsing import SECONDS, Console, browsing
from tests.support.meeting import HeldServing


class OpenPage(Protocol):
    def __call__(self, address: str = "", *, url: str = "", **context: Any) -> Page:
        """The page with `address` appended, of the server at `url`; `context` are options of a browser context."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """No longer than the package: while it lives, asyncio.run refuses to run."""
    with browsing() as running:
        yield running


@pytest.fixture
def console() -> Iterator[Console]:
    """No test passes with an error in a console that it does not expect."""
    console = Console()
    yield console
    assert console.unexpected() == []


@pytest.fixture
def open_page(browser: Browser, demo: HeldServing, console: Console) -> Iterator[OpenPage]:
    contexts = []

    def open_page(address: str = "", *, url: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        contexts.append(context)
        context.set_default_timeout(SECONDS * 1000)
        page = context.new_page()
        console.watch(page)
        page.goto(f"{url or demo.url}{address}")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page()


@pytest.fixture
def held_at_a_step(demo: HeldServing) -> Iterator[HeldServing]:
    """The server takes a few steps of what is sent to it, and no more until the test has ended."""
    with demo.held():
        demo.let(60)
        yield demo
