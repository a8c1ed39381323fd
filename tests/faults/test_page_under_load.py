"""The web page at a server whose queue is full: it waits, counts the seconds, and gets its image by itself."""

from __future__ import annotations

import re
from contextlib import ExitStack

from playwright.sync_api import expect

from engines.demo import BUNDLE
from tests.page import driving
from tests.support.browsing import SECONDS, browsing
from tests.support.serving import Serving

LONG = {"prompt": driving.PROMPT, "num_inference_steps": 200, "num_images": 8}
MOST = 200  # requests until the queue has to be full


def fill(server: Serving, streams: ExitStack) -> None:
    """Hold long requests, as event streams, until one more is refused."""
    for _ in range(MOST):
        stream = server.client.stream("POST", "/generate", json=LONG, headers={"Accept": "text/event-stream"})
        if streams.enter_context(stream).status_code == 429:
            return
    raise AssertionError(f"{MOST} requests did not fill the queue")


def test_the_page_waits_until_there_is_room() -> None:
    with Serving(BUNDLE, "--max-waiting", "1") as server, browsing() as browser:
        page = browser.new_page(reduced_motion="reduce")
        page.goto(server.url)
        driving.is_loaded(page)
        driving.prompt(page).fill(driving.PROMPT)
        with ExitStack() as streams:
            fill(server, streams)
            driving.button(page, "Generate").click()
            expect(driving.status(page)).to_contain_text("waiting")
            expect(page.get_by_text(re.compile(r"^Trying again in \d+ s$"))).to_be_visible()
        expect(driving.result(page)).to_be_visible(timeout=(120 + SECONDS) * 1000)
