"""The choice between several models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from engines.demo import BUNDLE as DEMO
from engines.manifest import MANIFEST, Manifest
from tests.page import driving
from tests.page.conftest import OpenPage
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The demo's model, and the same one with other defaults and examples."""
    quick = tmp_path_factory.mktemp("quick")
    shutil.copytree(DEMO / "onnx", quick / "onnx")
    shutil.copy(DEMO / "tokenizer.json", quick)
    manifest = Manifest.read(DEMO)
    defaults = manifest.defaults.model_copy(update={"num_inference_steps": 4, "scheduler": "euler_karras"})
    changes = {"name": "quick", "defaults": defaults, "examples": ("a quick fox",)}
    manifest.model_copy(update=changes).save(quick)
    assert (quick / MANIFEST).exists()
    with Serving(DEMO, "--bundle", str(quick)) as running:
        yield running


@pytest.fixture
def chosen(open_page: OpenPage, two: Serving) -> Page:
    """The page, with its options open and the second model chosen."""
    page = open_page(url=two.url)
    driving.is_loaded(page)
    driving.open_options(page)
    expect(models(page)).to_have_value("latentd-demo")
    models(page).select_option("quick")
    return page


def models(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Model", exact=True)


def test_one_model_is_no_choice(page: Page) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    expect(models(page)).to_be_hidden()
    driving.generate(page)
    assert "model" not in page.url


def test_defaults_follow_the_choice(chosen: Page) -> None:
    expect(chosen.get_by_label("Steps")).to_have_value("4")
    expect(chosen.get_by_label("Scheduler")).to_have_value("euler")
    expect(chosen.get_by_label("Noise schedule")).to_have_value("karras")
    expect(driving.button(chosen, "a quick fox")).to_be_visible()
    expect(chosen.locator("#model")).to_have_text("quick")
    models(chosen).select_option("latentd-demo")
    expect(chosen.get_by_label("Steps")).to_have_value("20")
    expect(chosen.get_by_label("Scheduler")).to_have_value("dpmpp_2m")


def test_what_the_user_has_set_stays(chosen: Page) -> None:
    chosen.get_by_label("Steps").fill("7")
    models(chosen).select_option("latentd-demo")
    expect(chosen.get_by_label("Steps")).to_have_value("7")
    expect(chosen.get_by_label("Scheduler")).to_have_value("dpmpp_2m")


def test_the_model_stays_with_the_address_and_with_the_image(chosen: Page) -> None:
    driving.generate(chosen)
    assert "model=quick" in chosen.url
    chosen.reload()
    driving.is_loaded(chosen)
    driving.open_options(chosen)
    expect(models(chosen)).to_have_value("quick")
    expect(chosen.get_by_label("Steps")).to_have_value("4")
    models(chosen).select_option("latentd-demo")
    chosen.get_by_role("list", name="Your images").get_by_role("button").first.click()
    dialog = chosen.get_by_role("dialog")
    expect(dialog).to_contain_text("quick")
    driving.button(chosen, "Restore settings").click()
    expect(models(chosen)).to_have_value("quick")
    expect(chosen.get_by_label("Steps")).to_have_value("4")


def test_a_model_that_is_not_there_is_the_first(open_page: OpenPage, two: Serving) -> None:
    page = open_page("#model=other&num_inference_steps=9", url=two.url)
    driving.is_loaded(page)
    driving.open_options(page)
    expect(models(page)).to_have_value("latentd-demo")
    expect(page.get_by_label("Steps")).to_have_value("9")


def test_copied_code_names_the_model(chosen: Page) -> None:
    driving.prompt(chosen).fill("a cat")
    chosen.get_by_text("Copy as", exact=True).click()
    driving.button(chosen, "curl").click()
    expect(chosen.get_by_label("Request", exact=True)).to_have_value(re.compile('"model":"quick"'))
