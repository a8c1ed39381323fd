"""The choice between quality and speed: the field `cache` of a request."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.test_presets import altered
from tests.page.test_size_conditions import sent

LABEL = "Quality and speed"


def test_it_is_the_servers_unless_it_is_chosen_and_a_picture_restores_its_own(page: Page) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    page.get_by_label("Steps").fill("5")
    choice = page.get_by_label(LABEL)
    assert "cache" not in sent(page)
    choice.select_option("faster")
    assert sent(page)["cache"] == "faster"
    assert "cache=faster" in page.url
    choice.select_option("")
    page.get_by_role("list", name="Your images").get_by_role("button").first.click()
    driving.button(page, "Restore settings").click()
    expect(choice).to_have_value("faster")


def test_it_is_not_offered_without_the_step_cache(open_page: OpenPage) -> None:
    page = open_page("/docs")
    page.context.route("**/models", altered(step_cache=False))
    page.goto(page.url.removesuffix("docs") + "#cache=fast")
    driving.is_loaded(page)
    driving.open_options(page)
    expect(page.get_by_label(LABEL)).to_be_hidden()
    page.get_by_label("Steps").fill("2")
    assert "cache" not in sent(page)
