"""The sizes that condition Stable Diffusion XL, and what else a model sets besides its scheduler."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from server.requests.schemas import SIZE_CONDITIONS
from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.test_presets import altered

FIELDS = ("Original size", "Target size", "Crop")


def conditioned(route: Route) -> None:
    """Answer as Stable Diffusion XL would, by the demo: it echoes the sizes, by default those of the image."""
    body = json.loads(route.request.post_data or "")
    defaults = {name: [body["height"], body["width"]] for name in SIZE_CONDITIONS} | {"crops_coords_top_left": [0, 0]}
    echoed = {name: body.pop(name, default) for name, default in defaults.items()}
    response = route.fetch(post_data=json.dumps(body))
    text = response.text()
    for name, value in echoed.items():
        text = text.replace(f'"{name}":null', f'"{name}":{json.dumps(value)}')
    route.fulfill(response=response, body=text)


@pytest.fixture
def able(open_page: OpenPage) -> Page:
    page = open_page("/docs")
    page.context.route("**/models", altered(size_conditions=True))
    page.context.route("**/generate", conditioned)
    page.goto(page.url.removesuffix("docs"))
    driving.is_loaded(page)
    driving.open_options(page)
    return page


def sent(page: Page) -> dict[str, Any]:
    with page.expect_request("**/generate") as request:
        driving.generate(page)
    body: dict[str, Any] = json.loads(request.value.post_data or "")
    return body


def test_a_model_without_them_has_no_fields(open_page: OpenPage) -> None:
    page = open_page("#original_size=96x64")
    driving.is_loaded(page)
    driving.open_options(page)
    for name in FIELDS:
        expect(page.get_by_label(name, exact=True)).to_be_hidden()
    page.get_by_label("Steps").fill("2")
    assert not {"original_size", "target_size", "crops_coords_top_left"} & sent(page).keys()


def test_they_are_sent_and_kept_with_the_address_and_the_picture(able: Page) -> None:
    able.get_by_label("Steps").fill("2")
    assert "original_size" not in sent(able)
    able.get_by_label("Original size", exact=True).fill("96x64")
    able.get_by_label("Crop", exact=True).fill("0, 7")
    body = sent(able)
    assert (body["original_size"], body["crops_coords_top_left"]) == ([64, 96], [0, 7])
    assert "target_size" not in body
    able.reload()
    driving.is_loaded(able)
    driving.open_options(able)
    expect(able.get_by_label("Original size", exact=True)).to_have_value("96x64")
    able.get_by_label("Original size", exact=True).fill("")
    able.get_by_label("Crop", exact=True).fill("9, 9")
    able.get_by_role("list", name="Your images").get_by_role("button").first.click()
    driving.button(able, "Restore settings").click()
    for name, value in zip(FIELDS, ("96x64", "", "0, 7"), strict=True):
        expect(able.get_by_label(name, exact=True)).to_have_value(value)


def test_what_is_no_size_is_not_sent(able: Page) -> None:
    able.get_by_label("Target size", exact=True).fill("large")
    driving.prompt(able).fill(driving.PROMPT)
    driving.button(able, "Generate").click()
    expect(able.get_by_label("Target size", exact=True)).to_be_focused()


def test_what_the_model_sets_is_said_under_its_scheduler(open_page: OpenPage) -> None:
    page = open_page("/docs")
    defaults = {"scheduler": "tcd", "timestep_spacing": "trailing", "eta": 0.3, "num_inference_steps": 1}
    page.context.route("**/models", altered(**defaults, timesteps=[800]))
    page.goto(page.url.removesuffix("docs"))
    driving.is_loaded(page)
    driving.open_options(page)
    said = "This model has trailing timestep spacing."
    expect(page.locator("#summary")).to_contain_text(f"{said} Its eta is 0.3. Its timesteps are 800, at 1 step.")
    page.get_by_label("Scheduler").select_option("euler")
    expect(page.locator("#summary")).to_contain_text(said)
    expect(page.locator("#summary")).not_to_contain_text("eta")
