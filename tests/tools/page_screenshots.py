"""Draws the pictures of the web page in docs/: the real page in Chromium, with the demo model.

python -m tests.tools.page_screenshots
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path
from typing import Any

import PIL.Image
from playwright.sync_api import Browser, Page, expect

from engines.demo import BUNDLE
from tests import ROOT
from tests.page import driving
from tests.support.browsing import browsing
from tests.support.serving import Serving

PROMPTS = (
    "a penguin on a blue background",
    "a red heart on a yellow background",
    "an owl on an orange background",
    "a strawberry on a white background",
    "a rocket on a black background",
    "a cactus on a pink background",
)
WIDE: dict[str, Any] = {"viewport": {"width": 1160, "height": 640}}
TALL: dict[str, Any] = {"viewport": {"width": 1160, "height": 860}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


def idle(page: Page) -> None:
    driving.is_loaded(page)


def running(page: Page) -> None:
    """Some way through a long request for two images, with previews."""
    page.locator("#options").evaluate("options => { options.open = true; }")
    page.locator("[name=num_images]").select_option("2")
    page.get_by_label("Steps").fill("200")
    page.get_by_label("Seed").fill("4")
    page.locator("#options").evaluate("options => { options.open = false; }")
    driving.prompt(page).fill(PROMPTS[0])
    driving.button(page, "Generate").click()
    expect(page.get_by_text(re.compile(r"^Step 1[2-9]\d of 200"))).to_be_visible()


def gallery(page: Page) -> None:
    for seed, prompt in enumerate(reversed(PROMPTS)):
        page.locator("[name=seed]").evaluate("(field, seed) => { field.value = seed; }", seed)
        driving.generate(page, prompt)


STATES = {"idle": (idle, WIDE), "running": (running, WIDE), "gallery": (gallery, TALL), "phone": (gallery, PHONE)}


def draw(browser: Browser, url: str, name: str, path: Path) -> None:
    prepare, context = STATES[name]
    page = browser.new_page(**context, reduced_motion="reduce", color_scheme="light")
    page.goto(url)
    driving.is_loaded(page)
    prepare(page)
    page.evaluate("document.activeElement.blur()")
    save(page.screenshot(), path)
    page.close()


def save(file: bytes, path: Path) -> None:
    """Few colours, for a small file."""
    PIL.Image.open(io.BytesIO(file)).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the files (default: docs)")
    out = parser.parse_args().out
    with Serving(BUNDLE) as server, browsing() as browser:
        for name in STATES:
            draw(browser, server.url, name, out / f"page-{name}.png")


if __name__ == "__main__":
    main()
