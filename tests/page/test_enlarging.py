"""A picture in a dialog, as large as there is room or a pixel for each."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.support.browsing import check_accessibility


def enlarged(page: Page) -> Locator:
    return page.get_by_role("dialog").get_by_role("img", name=driving.PROMPT)


def width(image: Locator) -> float:
    box = image.bounding_box()
    assert box
    return box["width"]


def test_a_click_on_the_image_enlarges_it(page: Page) -> None:
    driving.generate(page)
    driving.result(page).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert enlarged(page).evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert width(enlarged(page)) == 384  # of 64 pixels
    enlarged(page).click()
    assert width(enlarged(page)) == 64
    expect(driving.button(page, "Fit")).to_be_visible()
    page.keyboard.press("z")
    assert width(enlarged(page)) == 384


def test_the_keyboard_enlarges_and_comes_back(page: Page) -> None:
    driving.is_loaded(page)
    driving.generate(page)
    driving.generate(page)
    driving.button(page, "Enlarge").press("Enter")
    expect(page.get_by_role("heading", name="Image 1 of 2")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Image 2 of 2")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(driving.button(page, "Enlarge")).to_be_focused()


def test_an_image_that_was_deleted_is_still_enlarged(page: Page) -> None:
    driving.generate(page)
    driving.button(page, "Enlarge").click()
    driving.button(page, "Delete").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    driving.button(page, "Enlarge").click()
    expect(enlarged(page)).to_be_visible()
    driving.button(page, "Delete").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_it_is_accessible_on_a_phone(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    driving.generate(page)
    driving.result(page).tap()
    check_accessibility(page)
    enlarged(page).tap()
    check_accessibility(page)
