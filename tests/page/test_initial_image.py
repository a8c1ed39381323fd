"""Image-to-image and inpainting."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.driving import PROMPT
from tests.support.serving import Serving


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    PIL.Image.new("RGB", (96, 48), (20, 140, 60)).save(path)
    return path


def choose(page: Page, file: Path) -> None:
    driving.is_loaded(page)
    page.get_by_text("Initial image", exact=True).click()
    page.locator("input[type=file]").first.set_input_files(file)


def sent(page: Page) -> dict[str, Any]:
    """Press Generate; the body that the page sends."""
    driving.prompt(page).fill(PROMPT)
    with page.expect_request("**/generate") as request:
        driving.button(page, "Generate").click()
    driving.has_finished(page)
    body = request.value.post_data_json
    assert isinstance(body, dict)
    return body


def test_an_image_is_sent_with_its_strength(page: Page, file: Path) -> None:
    choose(page, file)
    expect(page.get_by_text("96 × 48 pixels, stretched to 64 × 64.")).to_be_visible()
    page.get_by_role("slider", name="Strength").press("ArrowLeft")
    body = sent(page)
    assert base64.b64decode(body["image"]) == file.read_bytes()
    assert body["strength"] == 0.75
    assert "mask" not in body


def test_what_is_painted_is_the_mask(page: Page, file: Path) -> None:
    choose(page, file)
    page.get_by_label("Regenerate only a part").check()
    canvas = page.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    mask = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(sent(page)["mask"]))).convert("L"))
    middle = mask.shape[0] // 2
    assert mask[middle, mask.shape[1] // 4] == 255
    assert mask[middle, -5] == 0
    assert mask[3, mask.shape[1] // 4] == 0


def test_a_result_is_the_next_initial_image(page: Page) -> None:
    driving.generate(page)
    driving.button(page, "Use as initial image").first.click()
    expect(page.get_by_text("64 × 64 pixels.", exact=True)).to_be_visible()
    assert sent(page)["image"]


def test_a_file_that_is_no_image_is_refused(page: Page, tmp_path: Path) -> None:
    other = tmp_path / "notes.png"
    other.write_text("hello")
    choose(page, other)
    expect(page.get_by_role("alert")).to_contain_text("notes.png is not a PNG, JPEG or WebP file")


def test_a_file_that_carries_its_settings_restores_them(page: Page, demo: Serving, tmp_path: Path) -> None:
    file = tmp_path / "heart.png"
    answer = demo.client.post("/generate", json={"prompt": PROMPT, "seed": 5}, headers={"Accept": "image/png"})
    file.write_bytes(answer.content)
    choose(page, file)
    driving.button(page, "Restore its settings").click()
    expect(driving.prompt(page)).to_have_value(PROMPT)
    expect(page.locator("[name=seed]")).to_have_value("5")
