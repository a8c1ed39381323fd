"""The choice of what decodes the images, where the model has a decoder besides its VAE."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.test_presets import altered
from tests.page.test_size_conditions import sent

TEXT = "a red heart\nSteps: 2, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 64x64, VAE Decoder: TAESD"


def decoding(route: Route) -> None:
    """Answer as a model with such a decoder would, by the demo."""
    body = json.loads(route.request.post_data or "")
    decoder = body.pop("decoder", "vae")
    response = route.fetch(post_data=json.dumps(body))
    route.fulfill(response=response, body=response.text().replace('"decoder":"vae"', f'"decoder":"{decoder}"'))


def choice(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Decoder", exact=True)


@pytest.fixture
def able(open_page: OpenPage) -> Page:
    page = open_page("/docs")
    page.context.route("**/models", altered(fast_decoder=True))
    page.context.route("**/generate", decoding)
    page.goto(page.url.removesuffix("docs"))
    driving.is_loaded(page)
    driving.open_options(page)
    page.get_by_label("Steps").fill("2")
    return page


def test_a_model_with_its_vae_alone_has_no_choice(open_page: OpenPage) -> None:
    page = open_page("#decoder=fast")
    driving.is_loaded(page)
    driving.open_options(page)
    expect(choice(page)).to_be_hidden()
    page.get_by_label("Steps").fill("2")
    assert "decoder" not in sent(page)
    driving.paste(page, TEXT)
    expect(driving.status(page)).to_contain_text("Not available here: decoder fast.")


def test_it_is_sent_and_kept_with_the_address_and_the_picture(able: Page) -> None:
    assert "decoder" not in sent(able)
    choice(able).select_option("fast")
    assert sent(able)["decoder"] == "fast"
    able.reload()
    driving.is_loaded(able)
    driving.open_options(able)
    expect(choice(able)).to_have_value("fast")
    choice(able).select_option("")
    able.get_by_role("list", name="Your images").get_by_role("button").first.click()
    driving.button(able, "Restore settings").click()
    expect(choice(able)).to_have_value("fast")


def test_it_is_read_from_the_web_uis_text(able: Page) -> None:
    driving.paste(able, TEXT)
    expect(driving.status(able)).to_have_text("The settings are restored.")
    expect(choice(able)).to_have_value("fast")
