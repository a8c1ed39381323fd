"""The system's Chromium, driven by Playwright, whose own download of browsers is never used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.support.programs import program

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SECONDS = 60.0  # how long anything may take on a busy machine
expect.set_options(timeout=SECONDS * 1000)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless browser. Its event loop is this thread's as long as it lives."""
    path = program(*_NAMES)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_OPTIONS)
        yield browser
        browser.close()


class Console:
    """Errors in the consoles of pages, uncaught ones and violations of the Content-Security-Policy included."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.expected: list[str] = []

    def watch(self, page: Page) -> None:
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def expect(self, text: str) -> None:
        """An error with this text belongs to the test."""
        self.expected.append(text)

    def unexpected(self) -> list[str]:
        return [error for error in self.errors if not any(text in error for text in self.expected)]

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location['url']})")


def check_accessibility(page: Page) -> None:
    """Fail with axe's report if it finds any violation, in the colours of both light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        results = Axe().run(page)
        assert results.violations_count == 0, f"in {scheme} colours: {results.generate_report()}"
