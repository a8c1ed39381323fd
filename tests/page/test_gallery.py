"""Every image stays: in the gallery, after a reload, with its settings."""

from __future__ import annotations

import io
import zipfile

import PIL.Image
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.page import driving
from tests.page.conftest import OpenPage
from tests.page.driving import PROMPT
from tests.support.browsing import check_accessibility

OTHER = "a penguin on a blue background"
FULL = """() => {
  IDBObjectStore.prototype.add = () => { throw new DOMException("no room", "QuotaExceededError"); };
}"""
SLOW = """() => {  // a transaction stays open while there are requests in it
  const { add } = IDBObjectStore.prototype;
  IDBObjectStore.prototype.add = function (value) {
    const until = Date.now() + 1000;
    const goOn = () => { if (Date.now() < until) this.count().onsuccess = goOn; };
    goOn();
    return add.call(this, value);
  };
}"""
FORBIDDEN = "() => Object.defineProperty(window, 'indexedDB', { get: () => { throw new Error('not here'); } })"


def gallery(page: Page) -> Locator:
    return page.get_by_role("region", name="Your images")


def thumbnails(page: Page) -> Locator:
    return page.get_by_role("list", name="Your images").get_by_role("button")


def viewer(page: Page) -> Locator:
    return page.get_by_role("dialog")


def generate_several(page: Page, count: int) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    page.locator("[name=num_images]").select_option(str(count))
    driving.generate(page)


def seeds(page: Page) -> list[str]:
    return [
        text.removeprefix("Seed ")
        for text in page.get_by_text("Seed ", exact=False).all_inner_texts()
        if text[5:].isdigit()
    ]


def test_images_survive_a_reload_and_restore_their_settings(page: Page) -> None:
    generate_several(page, 2)
    first, second = seeds(page)
    driving.generate(page, OTHER)
    page.goto(page.url.partition("#")[0] + "?again")
    driving.is_loaded(page)
    expect(thumbnails(page)).to_have_count(4)
    oldest = thumbnails(page).last
    expect(oldest).to_have_accessible_name(f"{PROMPT}, seed {first}")
    oldest.click()
    expect(viewer(page)).to_contain_text(first)
    driving.button(page, "Previous").click()
    expect(viewer(page)).to_contain_text(second)
    driving.button(page, "Restore settings").click()
    expect(viewer(page)).to_be_hidden()
    expect(driving.prompt(page)).to_have_value(PROMPT)
    expect(driving.prompt(page)).to_be_focused()
    expect(page.locator("[name=seed]")).to_have_value(second)


def test_each_of_several_images_has_its_preview_and_can_be_varied(page: Page) -> None:
    driving.is_loaded(page)
    driving.open_options(page)
    page.locator("[name=num_images]").select_option("2")
    page.get_by_label("Steps").fill("100")
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.locator("#pictures img[src^='data:image/jpeg']")).to_have_count(2)
    driving.has_finished(page)
    page.get_by_label("Steps").fill("20")
    first, second = seeds(page)
    assert int(second) == int(first) + 1
    page.get_by_role("button", name="Vary").last.click()
    expect(thumbnails(page)).to_have_count(3)
    expect(page.locator("#strength")).to_have_value("0.6")
    assert seeds(page) not in ([first], [second])


def test_an_initial_image_is_restored_too(page: Page) -> None:
    driving.generate(page)
    driving.button(page, "Vary").click()
    expect(thumbnails(page)).to_have_count(2)
    varied = driving.pixels(driving.result(page))
    page.reload()
    driving.is_loaded(page)
    expect(page.locator("#thumbnail")).to_be_hidden()
    thumbnails(page).first.click()
    driving.button(page, "Restore settings").click()
    expect(driving.status(page)).to_have_text("The settings are restored.")
    expect(page.locator("#thumbnail")).to_be_visible()
    expect(page.locator("#strength")).to_have_value("0.6")
    driving.button(page, "Generate").click()
    expect(thumbnails(page)).to_have_count(3)
    assert (driving.pixels(driving.result(page)) == varied).all()


def test_the_gallery_works_with_the_keyboard_alone(page: Page) -> None:
    generate_several(page, 3)
    thumbnails(page).first.focus()
    for key in ("ArrowRight", "End", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    expect(page.get_by_role("heading", name="Image 2 of 3")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Image 3 of 3")).to_be_visible()
    driving.button(page, "Delete").press("Enter")
    expect(page.get_by_role("heading", name="Image 2 of 2")).to_be_visible()
    page.keyboard.press("Escape")
    expect(viewer(page)).to_be_hidden()
    expect(thumbnails(page)).to_have_count(2)
    assert page.evaluate("document.activeElement.closest('#thumbnails') !== null")
    assert page.locator("#thumbnails [tabindex='0']").count() == 1


def test_all_images_are_downloaded_in_one_file(page: Page) -> None:
    generate_several(page, 2)
    with page.expect_download() as download:
        driving.button(page, "Download all").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        images = [PIL.Image.open(io.BytesIO(archive.read(name))) for name in names]
    assert sorted(names) == sorted(f"a-red-heart-on-a-yellow-background-{seed}.png" for seed in seeds(page))
    assert [image.size for image in images] == [(64, 64)] * 2
    assert all(PROMPT in image.info["parameters"] for image in images)


def test_all_images_can_be_deleted(page: Page) -> None:
    driving.generate(page)
    page.on("dialog", lambda dialog: dialog.accept())
    driving.button(page, "Delete all").click()
    expect(gallery(page)).to_be_hidden()
    page.reload()
    driving.is_loaded(page)
    expect(gallery(page)).to_be_hidden()


def test_the_oldest_of_more_than_a_hundred_is_given_up(page: Page) -> None:
    driving.generate(page)
    page.wait_for_function(
        """async () => {
          const { storedPictures } = await import(new URL("playground/picture-store.js", document.baseURI));
          return (await storedPictures()).length === 1;
        }"""
    )
    first = page.evaluate(
        """async () => {
          const base = new URL("playground/picture-store.js", document.baseURI);
          const { storedPictures, storePicture } = await import(base);
          const [{ id, ...picture }] = await storedPictures();
          for (let count = 0; count < 99; count += 1) await storePicture({ ...picture, seed: count });
          return id;
        }"""
    )
    page.reload()
    driving.is_loaded(page)
    expect(thumbnails(page)).to_have_count(100)
    driving.generate(page)
    page.wait_for_function(  # the new one is stored once the first is gone
        """async (first) => {
          const { storedPictures } = await import(new URL("playground/picture-store.js", document.baseURI));
          const pictures = await storedPictures();
          return pictures.length === 100 && pictures.every(({ id }) => id !== first);
        }""",
        arg=first,
    )
    page.reload()
    driving.is_loaded(page)
    expect(thumbnails(page)).to_have_count(100)
    expect(thumbnails(page).last).to_have_accessible_name(f"{PROMPT}, seed 0")


def test_an_image_that_is_shown_is_stored(open_page: OpenPage) -> None:
    page = open_page()
    page.add_init_script(f"({SLOW})()")
    page.reload()
    driving.generate(page)
    page.reload()
    driving.is_loaded(page)
    expect(thumbnails(page)).to_have_count(1)


@pytest.mark.parametrize(("script", "note"), [(FULL, "no room for more"), (FORBIDDEN, "does not store images")])
def test_without_storage_the_images_stay_until_the_page_is_closed(open_page: OpenPage, script: str, note: str) -> None:
    page = open_page()
    page.add_init_script(f"({script})()")
    page.reload()
    driving.generate(page)
    expect(gallery(page)).to_contain_text(note)
    expect(thumbnails(page)).to_have_count(1)


@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible(open_page: OpenPage, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 844})
    driving.generate(page)
    check_accessibility(page)
    thumbnails(page).first.click()
    expect(viewer(page)).to_be_visible()
    check_accessibility(page)
