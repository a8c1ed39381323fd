"""What people do on the page, by the names that a screen reader says."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from playwright.sync_api import Locator, Page, expect

PROMPT = "a red heart on a yellow background"
_FILE = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth ?? image.width, image.naturalHeight ?? image.height];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
}"""


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Describe the image")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def status(page: Page) -> Locator:
    return page.get_by_role("status").first


def result(page: Page, shows: str = PROMPT) -> Locator:
    """The first image of the result."""
    return page.get_by_role("region", name="Result").get_by_role("img", name=shows, exact=True).first


def is_loaded(page: Page) -> None:
    """Wait until the page has the model and can generate."""
    expect(button(page, "Generate")).to_be_enabled()


def has_finished(page: Page) -> None:
    expect(status(page)).to_have_text(re.compile(r" in [\d.]+ seconds\."))


def generate(page: Page, text: str = PROMPT) -> None:
    """Generate images, and wait until the gallery has them: only then they are stored, and survive a reload."""
    is_loaded(page)
    newest = page.locator("#thumbnails img").first
    before = newest.get_attribute("src") if newest.count() else None
    prompt(page).fill(text)
    button(page, "Generate").click()
    has_finished(page)
    expect(newest).not_to_have_attribute("src", before or "")


def start_long_one(page: Page) -> None:
    """Generate something that takes seconds, and wait for its first steps."""
    is_loaded(page)
    open_options(page)
    page.get_by_label("Steps").fill("200")
    prompt(page).fill(PROMPT)
    button(page, "Generate").click()
    expect(page.get_by_text(re.compile(r"^Step \d+ of 200"))).to_be_visible()


def open_options(page: Page) -> None:
    page.get_by_text("Options", exact=True).click()
    expect(page.get_by_label("Steps")).to_be_visible()


def paste(page: Page, text: str) -> None:
    """Paste `text` into the prompt."""
    prompt(page).evaluate(
        """(prompt, text) => {
          const clipboardData = new DataTransfer();
          clipboardData.setData("text/plain", text);
          prompt.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }""",
        text,
    )


def pixels(image: Locator) -> NDArray[np.float64]:
    """The pixels [H, W, 4] in 0..255 of an image or a canvas on the page."""
    file = base64.b64decode(image.evaluate(_FILE))
    return np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGBA"), np.float64)
