"""From a prompt to a picture."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from engines.demo import BUNDLE
from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.driving import PROMPT
from tests.support.bare_server import wait_until
from tests.support.browsing import Console
from tests.support.serving import Serving, pictures


def test_the_image_is_that_of_the_api(page: Page, demo: Serving) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    page.get_by_label("Seed").fill("7")
    driving.generate(page)
    (expected,) = pictures(demo.generate(prompt=PROMPT, seed=7))
    assert np.array_equal(driving.pixels(driving.result(page))[..., :3], expected)


def test_enter_generates_and_shift_enter_does_not(page: Page) -> None:
    driving.is_loaded(page)
    driving.prompt(page).press("Shift+Enter")
    expect(driving.button(page, "Generate")).to_be_enabled()
    driving.prompt(page).fill(PROMPT)
    driving.prompt(page).press("Enter")
    driving.has_finished(page)


def test_an_example_is_one_click(page: Page) -> None:
    driving.button(page, "a penguin on a blue background").click()
    driving.has_finished(page)
    expect(driving.prompt(page)).to_have_value("a penguin on a blue background")
    expect(driving.result(page, "a penguin on a blue background")).to_be_visible()


@pytest.mark.usefixtures("held_at_a_step")
def test_previews_come_before_the_image(page: Page) -> None:
    driving.start_long_one(page)
    image = page.get_by_role("region", name="Result").locator("img").first
    expect(image).to_have_attribute("src", re.compile(r"^data:image/(png|jpeg|webp)"))
    assert np.ptp(driving.pixels(image)) > 0


@pytest.mark.usefixtures("held_at_a_step")
def test_cancel_frees_the_device(page: Page, demo: Serving) -> None:
    before = cancelled(demo)
    driving.start_long_one(page)
    driving.button(page, "Cancel").click()
    expect(driving.status(page)).to_have_text("Cancelled.")
    expect(driving.button(page, "Generate")).to_be_focused()
    wait_until(lambda: cancelled(demo) == before + 1)


@pytest.mark.usefixtures("held_at_a_step")
def test_escape_cancels(page: Page) -> None:
    driving.start_long_one(page)
    page.keyboard.press("Escape")
    expect(driving.status(page)).to_have_text("Cancelled.")


def test_the_address_restores_the_form_and_the_image(page: Page, open_page: OpenPage) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    page.get_by_label("Negative prompt").fill("blue")
    page.get_by_label("Steps").fill("9")
    driving.generate(page)
    fragment = urlsplit(page.url).fragment
    assert parse_qs(fragment)["num_inference_steps"] == ["9"]

    other = open_page(f"/#{fragment}")
    expect(driving.status(other)).to_have_text("Press Generate to create the image of this link.")
    expect(driving.prompt(other)).to_have_value(PROMPT)
    driving.button(other, "Generate").click()
    driving.has_finished(other)
    assert np.array_equal(driving.pixels(driving.result(other)), driving.pixels(driving.result(page)))


def test_everything_works_by_keyboard(page: Page) -> None:
    """Tab reaches what is needed, in the order of the page."""
    driving.is_loaded(page)
    expect(driving.prompt(page)).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Tab")
    expect(driving.button(page, "Generate")).to_be_focused()
    page.keyboard.press("Enter")
    driving.has_finished(page)
    tab_to(page, "Options")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Negative prompt")).to_be_focused()


def test_a_refusal_is_shown_and_the_form_stays(page: Page, console: Console) -> None:
    console.expect("422")
    driving.is_loaded(page)
    page.locator("[name=size]").evaluate("list => { list.add(new Option('512x512')); list.value = '512x512'; }")
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("512x512")
    expect(driving.prompt(page)).to_have_value(PROMPT)
    expect(driving.button(page, "Generate")).to_be_enabled()


def test_a_lost_server_is_said(open_page: OpenPage, console: Console) -> None:
    console.expect("ERR_")
    console.expect("TypeError")
    with Serving(BUNDLE) as leaving:
        page = open_page(url=leaving.url)
        driving.generate(page)
    driving.button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The connection to the server was lost")


def cancelled(demo: Serving) -> float:
    return demo.total("latentd_requests_total", outcome="cancelled")


def tab_to(page: Page, words: str) -> None:
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").strip().startswith(words):
            return
    raise AssertionError(f"Tab does not reach {words}")
