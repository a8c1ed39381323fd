"""Sizes and styles to choose from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.page import driving
from tests.page.conftest import OpenPage

SIZES = ["512x512", "512x768", "768x512", "640x384"]


@pytest.fixture
def full_model(open_page: OpenPage) -> Page:
    """The page as a server of a full-size model would fill it: the demo's answer, with other sizes and another name."""
    page = open_page("/docs")
    page.context.route("**/models", altered(name="full", resolutions=SIZES))
    page.goto(page.url.removesuffix("docs"))
    driving.is_loaded(page)
    driving.open_options(page)
    return page


def altered(**changes: Any) -> Callable[[Route], None]:
    def answer(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=json.dumps([{**response.json()[0], **changes}]))

    return answer


def test_sizes_are_grouped_by_shape(full_model: Page) -> None:
    sizes = full_model.get_by_label("Size (pixels)")
    groups = sizes.evaluate(
        "list => [...list.children].map(({ label, children }) => [label, ...[...children].map((o) => o.value)])"
    )
    assert groups == [["Square", "512x512"], ["Portrait", "512x768"], ["Landscape", "768x512", "640x384"]]
    expect(sizes).to_have_value("512x512")


def test_width_and_height_swap_where_both_sizes_exist(full_model: Page) -> None:
    sizes, swap = full_model.get_by_label("Size (pixels)"), driving.button(full_model, "Swap width and height")
    expect(swap).to_be_hidden()  # of a square
    sizes.select_option("768x512")
    swap.click()
    expect(sizes).to_have_value("512x768")
    assert "size=512x768" in full_model.url
    swap.click()
    expect(sizes).to_have_value("768x512")
    sizes.select_option("640x384")  # which has no counterpart
    expect(swap).to_be_hidden()


def test_the_address_selects_a_size_to_swap(full_model: Page) -> None:
    full_model.evaluate("location.hash = 'size=512x768'")
    expect(full_model.get_by_label("Size (pixels)")).to_have_value("512x768")
    expect(driving.button(full_model, "Swap width and height")).to_be_visible()


def test_a_style_is_words_of_the_prompt(full_model: Page) -> None:
    prompt, style = driving.prompt(full_model), full_model.get_by_label("Style")
    prompt.fill("a lighthouse")
    style.select_option("Watercolour")
    expect(prompt).to_have_value("a lighthouse, watercolour painting, soft washes")
    style.select_option("Pixel art")
    expect(prompt).to_have_value("a lighthouse, pixel art, limited palette")
    style.select_option("As in the prompt")
    expect(prompt).to_have_value("a lighthouse")


def test_the_prompt_says_which_style_it_has(full_model: Page) -> None:
    prompt, style = driving.prompt(full_model), full_model.get_by_label("Style")
    prompt.fill("a cat, pixel art, limited palette")
    expect(style.locator("option:checked")).to_have_text("Pixel art")
    prompt.fill("a cat, pixel art, limited palette, at night")
    expect(style.locator("option:checked")).to_have_text("As in the prompt")


def test_the_demo_offers_what_it_can_draw(page: Page) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    driving.prompt(page).fill("a penguin on a blue background")
    background = page.get_by_label("Background")
    expect(background.locator("option:checked")).to_have_text("blue")
    background.select_option("orange")
    expect(driving.prompt(page)).to_have_value("a penguin on an orange background")
    assert "orange" in page.url
