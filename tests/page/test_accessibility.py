"""Axe finds nothing, in light and dark, on wide screens and phones, in every state of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.support.browsing import check_accessibility

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(params=[{}, PHONE], ids=["wide", "phone"])
def page(request: pytest.FixtureRequest, open_page: OpenPage) -> Iterator[Page]:
    context: dict[str, Any] = request.param
    page = open_page(**context)
    driving.is_loaded(page)
    yield page
    too_wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not too_wide, "the page scrolls sideways"


def test_idle(page: Page) -> None:
    check_accessibility(page)


def test_with_everything_open(page: Page) -> None:
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    expect(page.get_by_label("Steps")).to_be_visible()
    check_accessibility(page)


def test_with_a_result(page: Page) -> None:
    driving.generate(page)
    check_accessibility(page)


@pytest.mark.usefixtures("held_at_a_step")
def test_while_it_generates(page: Page) -> None:
    driving.start_long_one(page)
    check_accessibility(page)
    driving.button(page, "Cancel").click()


def test_with_an_error(page: Page) -> None:
    """An error of the page itself: a file that is no image."""
    page.get_by_text("Initial image", exact=True).click()
    no_image = {"name": "notes.png", "mimeType": "image/png", "buffer": b"hello"}
    page.locator("input[type=file]").first.set_input_files(no_image)  # type: ignore[arg-type] # a dictionary is a FilePayload
    expect(page.get_by_role("alert")).to_contain_text("notes.png")
    check_accessibility(page)
