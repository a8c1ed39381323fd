"""The page at a server that asks for API keys, below a path."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from engines.demo import BUNDLE
from server.access import keys
from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.driving import PROMPT
from tests.support.browsing import Console
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

PREFIX = "/tools/images"
KEY = keys.new_key()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldServing]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(keys.entry("ann", KEY, admin=False) + "concurrency = 1\n")
    with HeldServing(BUNDLE, "--api-keys", str(path), "--root-path", PREFIX) as running:
        yield running


@pytest.fixture
def page(open_page: OpenPage, keyed: Serving, console: Console) -> Page:
    console.expect("401")
    return open_page(f"{PREFIX}/", url=keyed.url)


def give(page: Page, key: str) -> None:
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    field.fill(key)
    field.press("Enter")


def test_a_wrong_key_is_asked_for_again_and_the_right_one_is_kept(page: Page) -> None:
    give(page, KEY[:-1])
    expect(page.get_by_text("The API key is not known")).to_be_visible()
    give(page, KEY)
    driving.generate(page)
    page.reload()
    driving.generate(page)


def test_a_second_request_of_a_key_waits_for_the_first(page: Page, keyed: HeldServing, console: Console) -> None:
    console.expect("429")
    give(page, KEY)
    driving.is_loaded(page)
    long = {"prompt": PROMPT, "num_inference_steps": 200}
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {KEY}"}
    with keyed.held(), keyed.client.stream("POST", "/generate", json=long, headers=headers) as first:
        assert first.status_code == 200
        driving.prompt(page).fill(PROMPT)
        driving.button(page, "Generate").click()
        expect(page.get_by_text(re.compile(r"^Trying again in \d+ s$"))).to_be_visible()
    driving.has_finished(page)
