"""The tools of the inpainting mask, by pointer, by touch and by keyboard."""

from __future__ import annotations

import base64
import io

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Locator, Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.driving import PROMPT


@pytest.fixture
def page(page: Page) -> Page:
    begin(page)
    return page


def begin(page: Page) -> None:
    """An initial image of 128 x 64, of which a part is regenerated."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (128, 64), (20, 140, 60)).save(file, "PNG")
    driving.is_loaded(page)
    page.get_by_text("Initial image", exact=True).click()
    page.locator("input[type=file]").first.set_input_files(
        {"name": "wide.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    page.get_by_label("Regenerate only a part").check()
    canvas(page).scroll_into_view_if_needed()


def canvas(page: Page) -> Locator:
    return page.get_by_role("application", name="Mask")


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke between two points, given as fractions of the width and the height."""
    box = canvas(page).bounding_box()
    assert box
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=8)
    page.mouse.up()


def painted(page: Page) -> NDArray[np.bool_]:
    """Which pixels of the canvas [256, 512] are painted."""
    alpha = driving.pixels(canvas(page))[..., 3]
    assert alpha.shape == (256, 512)
    return alpha > 127


def sent_mask(page: Page) -> NDArray[np.bool_]:
    driving.prompt(page).fill(PROMPT)
    with page.expect_request("**/generate") as request:
        driving.button(page, "Generate").click()
    driving.has_finished(page)
    body = request.value.post_data_json
    assert isinstance(body, dict)
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(body["mask"]))).convert("L")) > 127


def test_undo_and_redo_go_stroke_by_stroke(page: Page) -> None:
    drag(page, (0.1, 0.5), (0.4, 0.5))
    first = painted(page)
    drag(page, (0.6, 0.5), (0.9, 0.5))
    both = painted(page)
    assert both.sum() > first.sum() > 0
    driving.button(page, "Undo").click()
    assert np.array_equal(painted(page), first)
    driving.button(page, "Undo").click()
    assert not painted(page).any()
    expect(page.get_by_text("Nothing is painted.")).to_be_visible()
    canvas(page).focus()
    page.keyboard.press("Control+y")
    page.keyboard.press("Control+Shift+Z")
    assert np.array_equal(painted(page), both)
    driving.button(page, "Redo").click()  # there is nothing more
    assert np.array_equal(painted(page), both)


def test_a_new_stroke_forgets_what_was_undone(page: Page) -> None:
    drag(page, (0.1, 0.5), (0.4, 0.5))
    driving.button(page, "Undo").click()
    drag(page, (0.6, 0.5), (0.9, 0.5))
    after = painted(page)
    driving.button(page, "Redo").click()
    assert np.array_equal(painted(page), after)


def test_the_eraser_takes_paint_away(page: Page) -> None:
    drag(page, (0.1, 0.5), (0.9, 0.5))
    page.get_by_label("Eraser").check()
    drag(page, (0.5, 0.1), (0.5, 0.9))
    mask = sent_mask(page)
    assert not mask[128, 256]
    assert mask[128, 100]
    assert mask[128, 400]


def test_invert_and_clear(page: Page) -> None:
    drag(page, (0.1, 0.5), (0.4, 0.5))
    before = painted(page)
    driving.button(page, "Invert").click()
    assert np.mean(painted(page) == ~before) > 0.999  # but for pixels on its edge
    driving.button(page, "Clear").click()
    assert not painted(page).any()
    driving.button(page, "Undo").click()
    assert np.mean(painted(page) == ~before) > 0.999


def test_a_mask_is_painted_by_keyboard_alone(page: Page) -> None:
    canvas(page).focus()
    page.keyboard.press("]")
    page.keyboard.press("]")
    page.keyboard.press("[")
    assert page.get_by_label("Brush").input_value() == "44"
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    page.keyboard.down(" ")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    for _ in range(5):
        page.keyboard.press("ArrowRight")  # the pen is up again
    mask = sent_mask(page)
    assert mask[128, 200]
    assert mask[128, 256]
    assert not mask[128, 320]


def test_the_cursor_stays_on_the_image(page: Page) -> None:
    canvas(page).focus()
    for _ in range(60):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert painted(page)[0, 256]


def test_shortcuts_are_keys_of_the_mask_alone(page: Page) -> None:
    drag(page, (0.1, 0.5), (0.4, 0.5))
    driving.prompt(page).fill("")
    driving.prompt(page).press_sequentially("ice [e]")
    expect(driving.prompt(page)).to_have_value("ice [e]")
    expect(page.get_by_label("Eraser")).not_to_be_checked()
    canvas(page).focus()
    page.keyboard.press("e")
    expect(page.get_by_label("Eraser")).to_be_checked()
    page.keyboard.press("Delete")
    assert not painted(page).any()


def test_a_stroke_that_leaves_the_canvas_goes_on(page: Page) -> None:
    """The pointer is captured."""
    drag(page, (0.5, 0.5), (0.5, 3.0))
    mask = painted(page)
    assert mask[-1, 256]
    drag(page, (0.1, 0.2), (0.2, 0.2))
    assert not painted(page)[-1, 60]


def test_a_finger_paints(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    begin(page)
    canvas(page).tap()
    mask = painted(page)
    assert mask[128, 256]
    assert not mask[128, 20]
    expect(page.get_by_text(" % is painted.")).to_be_visible()


def test_a_second_finger_takes_the_stroke_back(page: Page) -> None:
    """The browser cancels the first one's pointer to zoom the page."""
    canvas(page).evaluate("""canvas => {
      const fire = (kind) => canvas.dispatchEvent(new PointerEvent(kind, { pointerId: 1, isPrimary: true, bubbles: true,
        clientX: canvas.getBoundingClientRect().x + 50, clientY: canvas.getBoundingClientRect().y + 50 }));
      canvas.setPointerCapture = () => {};
      ["pointerdown", "pointermove", "pointercancel", "lostpointercapture"].forEach(fire);
    }""")
    assert not painted(page).any()


def test_painting_chooses_the_strength_of_inpainting(page: Page) -> None:
    strength = page.get_by_role("slider", name="Strength")
    expect(strength).to_have_value("0.8")
    drag(page, (0.1, 0.5), (0.4, 0.5))
    expect(strength).to_have_value("1")
    driving.button(page, "Clear").click()
    expect(strength).to_have_value("0.8")
