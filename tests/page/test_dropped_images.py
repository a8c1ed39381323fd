"""Image files of any program give their settings back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from tests.page import driving
from tests.page.driving import PROMPT
from tests.page.test_gallery import thumbnails

TEXT = """\
a "café" in a forest
Negative prompt: blurry,
grey
Steps: 12, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 64x64, Model: "a, b", Clip skip: 2"""  # noqa: E501
DROP = """([bytes, type]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(bytes)], "dropped", { type }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
READ = """async (bytes) => {
  const { readParameters } = await import(new URL("playground/metadata.js", document.baseURI));
  return readParameters(Uint8Array.from(bytes));
}"""


def exif(text: bytes) -> PIL.Image.Exif:
    block = PIL.Image.Exif()
    block.get_ifd(IFD.Exif)[Base.UserComment] = text
    return block


def chunk(text: str, *, itxt: bool = False, compressed: bool = False) -> PngInfo:
    chunks = PngInfo()
    chunks.add_text("Software", "something")
    add = chunks.add_itxt if itxt else chunks.add_text
    add("parameters", text, zip=compressed)
    return chunks


def saved(image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "orange").save(file, image_format, **options)
    return file.getvalue()


FILES = {
    "tEXt": saved("png", pnginfo=chunk(TEXT)),
    "zTXt": saved("png", pnginfo=chunk(TEXT, compressed=True)),
    "iTXt": saved("png", pnginfo=chunk(TEXT, itxt=True)),
    "compressed iTXt": saved("png", pnginfo=chunk(TEXT, itxt=True, compressed=True)),
    "JPEG": saved("jpeg", exif=exif(b"UNICODE\0" + TEXT.encode("utf-16-be"))),
    "JPEG, little-endian": saved("jpeg", exif=exif(b"UNICODE\0" + TEXT.encode("utf-16-le"))),
    "WebP": saved("webp", exif=exif(b"UNICODE\0" + TEXT.encode("utf-16-be"))),
}


def drop(page: Page, content: bytes, media_type: str) -> None:
    page.evaluate(DROP, [list(content), media_type])


@pytest.fixture
def loaded(page: Page) -> Page:
    driving.is_loaded(page)
    return page


def test_the_text_is_read_from_every_kind_of_file(loaded: Page) -> None:
    for kind, content in FILES.items():
        assert loaded.evaluate(READ, list(content)) == TEXT, kind


def test_broken_files_and_files_without_text_are_no_error(loaded: Page) -> None:
    bare = [saved(kind) for kind in ("png", "jpeg", "webp")]
    cut = [content[:length] for content in FILES.values() for length in (3, 20, 60, 90, 130)]
    for content in (b"", b"GIF89a", *bare):
        assert loaded.evaluate(READ, list(content)) is None
    for content in cut:
        assert TEXT.startswith(loaded.evaluate(READ, list(content)) or "")


def test_a_dropped_image_restores_its_settings_and_says_what_is_lost(loaded: Page) -> None:
    drop(loaded, FILES["WebP"], "image/webp")
    expect(loaded.locator("#thumbnail")).to_be_visible()  # it is the initial image, unless its settings are wanted
    driving.button(loaded, "Restore its settings").click()
    expect(driving.prompt(loaded)).to_have_value('a "café" in a forest')
    values = {name: loaded.locator(f"[name={name}]").input_value() for name in ("seed", "scheduler", "negative_prompt")}
    assert values == {"seed": "42", "scheduler": "dpmpp_2m_karras", "negative_prompt": "blurry, grey"}
    expect(loaded.locator("[name=num_inference_steps]")).to_have_value("12")
    expect(loaded.locator("[name=guidance_scale]")).to_have_value("7.5")
    expect(loaded.locator("#thumbnail")).to_be_hidden()
    expect(driving.status(loaded)).to_have_text("The settings are restored. Not available here: Clip skip.")


def test_pasted_text_restores_its_settings(loaded: Page) -> None:
    driving.paste(loaded, TEXT)
    expect(driving.prompt(loaded)).to_have_value('a "café" in a forest')
    expect(loaded.locator("[name=seed]")).to_have_value("42")


def test_an_unknown_sampler_and_size_are_said(loaded: Page) -> None:
    text = TEXT.replace("DPM++ 2M", "Restart").replace("64x64", "512x768").replace(", Clip skip: 2", "")
    drop(loaded, saved("png", pnginfo=chunk(text)), "image/png")
    driving.button(loaded, "Restore its settings").click()
    expect(driving.status(loaded)).to_contain_text("Not available here: size 512x768, scheduler Restart Karras.")
    expect(loaded.locator("[name=scheduler]")).to_have_value("dpmpp_2m")


def test_a_plain_image_offers_nothing(loaded: Page) -> None:
    drop(loaded, saved("png"), "image/png")
    expect(loaded.locator("#thumbnail")).to_be_visible()
    expect(driving.button(loaded, "Restore its settings")).to_be_hidden()


def test_a_download_brings_the_same_image_back(loaded: Page, tmp_path: Path) -> None:
    driving.generate(loaded)
    before = driving.pixels(driving.result(loaded))
    with loaded.expect_download() as download:
        loaded.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "image.png")
    driving.prompt(loaded).fill("something else")
    loaded.locator("#file").set_input_files(tmp_path / "image.png")
    driving.button(loaded, "Restore its settings").click()
    expect(driving.prompt(loaded)).to_have_value(PROMPT)
    driving.button(loaded, "Generate").click()
    expect(thumbnails(loaded)).to_have_count(2)
    assert (driving.pixels(driving.result(loaded)) == before).all()
