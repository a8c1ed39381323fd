"""LoRAs on the page: chosen with a weight, kept in the address and with pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engines.manifest import Manifest
from tests.page import driving
from tests.page.conftest import OpenPage
from tests.support.lora_files import write_lora
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def with_loras(lora_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder, manifest = tmp_path_factory.mktemp("loras"), Manifest.load(lora_bundle)
    write_lora(folder / "ink.safetensors", manifest, metadata={"modelspec.trigger_phrase": "ink style"})
    write_lora(folder / "styles/wash.safetensors", manifest, seed=1)
    (folder / "broken.safetensors").write_bytes(b"no LoRA")
    with Serving(lora_bundle, "--loras", str(folder)) as running:
        yield running


@pytest.fixture
def able(open_page: OpenPage, with_loras: Serving) -> Page:
    page = open_page(url=with_loras.url)
    driving.is_loaded(page)
    driving.open_options(page)
    return page


def test_a_server_without_loras_offers_none(page: Page) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    expect(page.get_by_role("combobox", name="LoRA", exact=True)).to_be_hidden()


def test_loras_are_chosen_with_a_weight(able: Page) -> None:
    offered = able.get_by_role("combobox", name="LoRA", exact=True)
    expect(offered.locator("option")).to_have_text(["Add a LoRA", "ink", "styles/wash"])
    offered.select_option("ink")
    offered.select_option("styles/wash")
    expect(offered.locator("option[value=ink]")).to_be_disabled()
    able.get_by_role("slider", name="Weight of ink").fill("0.5")
    able.get_by_role("slider", name="Weight of styles/wash").fill("-1")
    able.get_by_label("Steps").fill("2")
    with able.expect_request("**/generate") as sent:
        driving.generate(able)
    assert json.loads(sent.value.post_data or "")["loras"] == [
        {"name": "ink", "weight": 0.5},
        {"name": "styles/wash", "weight": -1},
    ]
    driving.button(able, "Remove ink").click()
    expect(able.get_by_role("list", name="Chosen LoRAs").get_by_role("listitem")).to_have_count(1)
    with able.expect_request("**/generate") as sent:
        driving.generate(able)
    assert json.loads(sent.value.post_data or "")["loras"] == [{"name": "styles/wash", "weight": -1}]


def test_the_address_has_them(able: Page, open_page: OpenPage) -> None:
    able.get_by_role("combobox", name="LoRA", exact=True).select_option("ink")
    able.get_by_role("slider", name="Weight of ink").fill("0.5")
    again = open_page(url=able.url)
    driving.is_loaded(again)
    driving.open_options(again)
    expect(again.get_by_role("slider", name="Weight of ink")).to_have_value("0.5")
    again.evaluate("location.hash = 'prompt=x&loras=broken'")
    expect(again.get_by_role("slider", name="Weight of ink")).to_have_count(0)


def test_settings_of_a_picture_have_them_once(able: Page) -> None:
    able.get_by_role("combobox", name="LoRA", exact=True).select_option("styles/wash")
    able.get_by_label("Steps").fill("2")
    text = f"{driving.PROMPT} <lora:ink:0.5>"
    driving.generate(able, text)
    driving.button(able, "Remove styles/wash").click()
    driving.result(able, text).click()
    driving.button(able, "Restore settings").click()
    expect(driving.prompt(able)).to_have_value(text)  # which names one of them
    chosen = able.get_by_role("list", name="Chosen LoRAs")
    expect(chosen.get_by_role("listitem")).to_have_count(1)
    expect(chosen.get_by_role("slider", name="Weight of styles/wash")).to_have_value("1")
