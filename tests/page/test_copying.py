"""Code that the page writes, run against the server: its image is the page's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.support.serving import Serving, pictures

# Quotes of every language, an @ that curl would read as a file, a shell's variable, and letters beyond Latin-1.
PROMPT = '@a "red" heart\'s $HOME `date` \\n ${x} ハート 🎨 on a yellow background'
PROGRAMS = {
    "curl": ["bash", "-eu"],
    "Python": [sys.executable, "-W", "ignore", "-"],
    "JavaScript": ["node", "--input-type=module", "-"],
}
each_language = pytest.mark.parametrize("language", PROGRAMS)


def code(page: Page, language: str) -> str:
    driving.button(page, language).click()
    text = page.get_by_label("Request", exact=True)
    expect(text).to_be_visible()
    return text.input_value()


def execute(language: str, program: str, folder: Path) -> None:
    command = PROGRAMS[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, input=program, cwd=folder, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - what the page wrote
    assert done.returncode == 0, done.stderr


def file_in(folder: Path, *but: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    (path,) = [path for path in folder.iterdir() if path.name not in but]
    return np.asarray(PIL.Image.open(path), np.float64)


@pytest.fixture
def filled(page: Page) -> Page:
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.open_options(page)
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Steps").fill("4")
    page.get_by_text("Copy as", exact=True).click()
    return page


@each_language
def test_code_makes_the_image_of_the_form(filled: Page, demo: Serving, tmp_path: Path, language: str) -> None:
    execute(language, code(filled, language), tmp_path)
    (expected,) = pictures(demo.generate(prompt=PROMPT, seed=11, num_inference_steps=4))
    assert np.array_equal(file_in(tmp_path), expected)


@each_language
def test_code_sends_the_files_of_the_form(filled: Page, tmp_path: Path, language: str) -> None:
    name = 'my "first" file.png'
    image = PIL.Image.new("RGB", (64, 64), (20, 140, 60))
    image.save(tmp_path / name)
    filled.get_by_text("Initial image", exact=True).click()
    filled.locator("input[type=file]").first.set_input_files(tmp_path / name)
    filled.get_by_label("Regenerate only a part").check()
    driving.button(filled, "Invert").click()  # of nothing: everything
    filled.get_by_role("application", name="Mask").click()
    filled.get_by_label("Eraser").check()
    filled.get_by_role("application", name="Mask").click()
    program = code(filled, language)
    with filled.expect_download() as download:
        filled.get_by_role("link", name="mask.png").click()
    download.value.save_as(tmp_path / "mask.png")
    execute(language, program, tmp_path)
    driving.button(filled, "Generate").click()
    driving.has_finished(filled)
    shown = driving.pixels(driving.result(filled, PROMPT))[..., :3]
    assert np.array_equal(file_in(tmp_path, name, "mask.png"), shown)


@each_language
def test_code_for_several_images_keeps_them_all(filled: Page, tmp_path: Path, language: str) -> None:
    filled.locator("[name=num_images]").select_option("2")
    execute(language, code(filled, language), tmp_path)
    expected = {"images.json"} if language == "curl" else {"11.png", "12.png"}
    assert {path.name for path in tmp_path.iterdir()} == expected


@each_language
def test_code_says_what_the_server_refuses(filled: Page, tmp_path: Path, language: str) -> None:
    program = code(filled, language).replace("dpmpp_2m", "nonsense")
    with pytest.raises(AssertionError, match="422"):
        execute(language, program, tmp_path)


def test_a_link_opens_the_form_as_it_is(filled: Page, open_page: OpenPage) -> None:
    link = code(filled, "Link")
    other = open_page(url=link)
    driving.is_loaded(other)
    expect(driving.prompt(other)).to_have_value(PROMPT)
    expect(other.get_by_text("Seed 11 is fixed.")).to_be_visible()


def test_it_is_copied(open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    driving.is_loaded(page)
    page.get_by_text("Copy as", exact=True).click()
    text = code(page, "curl")
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    driving.prompt(page).press_sequentially("x")
    expect(page.get_by_label("Request", exact=True)).to_be_hidden()  # it is no longer what the form says


def test_without_a_clipboard_it_is_selected(page: Page) -> None:
    """As on a page without HTTPS."""
    driving.is_loaded(page)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_text("Copy as", exact=True).click()
    text = code(page, "Python")
    expect(page.get_by_text("Press Ctrl+C to copy it.")).to_be_visible()
    assert page.evaluate("getSelection().toString()") == text
