"""On a phone the image stays in view and everything can be touched; wide screens show it beside the form."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.driving import PROMPT
from tests.page.test_gallery import thumbnails
from tests.support.meeting import HeldServing

SMALL = """() => [...document.querySelectorAll("button, a, select, summary, input")]
  .filter((element) => !["range", "checkbox", "file"].includes(element.type))
  .filter((element) => element.checkVisibility() && element.getBoundingClientRect().height < 43.9)
  .map((element) => element.textContent || element.name)"""


@pytest.fixture
def phone(open_page: OpenPage) -> Page:
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    driving.is_loaded(page)
    return page


def in_view(page: Page, selector: str) -> bool:
    """Whether an element is wholly on the screen, above the bar with the buttons."""
    box = page.locator(selector).first.bounding_box()
    bar = page.locator(".bar").bounding_box()
    assert box is not None
    assert bar is not None
    return box["y"] >= 0 and box["y"] + box["height"] <= bar["y"] + 1


def test_the_image_and_cancel_are_in_view_while_it_is_made(phone: Page, held_at_a_step: HeldServing) -> None:
    driving.start_long_one(phone)  # its options are open
    expect(phone.locator("#pictures img[src^='data:image/jpeg']")).to_be_visible()
    assert in_view(phone, "#status")
    assert in_view(phone, "#pictures img")
    expect(driving.button(phone, "Cancel")).to_be_in_viewport(ratio=1)
    assert phone.evaluate("document.activeElement.id") != "prompt"  # its keyboard would hide the image
    held_at_a_step.let(200)
    driving.has_finished(phone)
    assert in_view(phone, "#pictures img")


def test_everything_can_be_touched(phone: Page) -> None:
    driving.generate(phone)
    phone.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert phone.evaluate(SMALL) == []
    thumbnails(phone).first.tap()
    expect(phone.get_by_role("dialog")).to_be_visible()
    assert phone.evaluate(SMALL) == []


def test_wide_screens_show_the_image_beside_the_form(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 1280, "height": 720})
    driving.generate(page)
    prompt, image = driving.prompt(page).bounding_box(), driving.result(page, PROMPT).bounding_box()
    assert prompt is not None
    assert image is not None
    assert image["x"] > prompt["x"] + prompt["width"]
    expect(driving.result(page)).to_be_in_viewport()
