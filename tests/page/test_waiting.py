"""The page waits by itself, says for what, and can be stopped; it asks for what the server wants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from tests.page import driving
from tests.page.driving import PROMPT
from tests.page.test_gallery import thumbnails
from tests.support.browsing import Console, check_accessibility

BUSY = {"title": "Queue full", "detail": "9 requests are waiting: try again later."}
LOCKED = {"title": "Unauthenticated", "detail": "This server asks for an API key."}


def refuse(route: Route, status: int, problem: dict[str, str], **headers: str) -> None:
    route.fulfill(status=status, headers=headers, content_type="application/problem+json", body=json.dumps(problem))


def refusing(times: int, status: int, problem: dict[str, str], seconds: int) -> Callable[[Route], None]:
    """A handler of routes that refuses so many requests."""
    left = [times]

    def handle(route: Route) -> None:
        left[0] -= 1
        if left[0] < 0:
            route.continue_()
        else:
            refuse(route, status, problem, **{"Retry-After": str(seconds)})

    return handle


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_by_itself(page: Page, console: Console, status: int) -> None:
    console.expect(str(status))
    page.route("**/generate", refusing(2, status, BUSY, 2))
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(driving.status(page)).to_have_text(BUSY["detail"])
    expect(page.get_by_text(re.compile("^Trying again in [12] s$"))).to_be_visible()
    driving.has_finished(page)


def test_the_wait_can_be_cancelled(page: Page, console: Console) -> None:
    console.expect("429")
    page.route("**/generate", refusing(9, 429, BUSY, 60))
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.get_by_text("Trying again in")).to_be_visible()
    driving.button(page, "Cancel").click()
    expect(driving.status(page)).to_have_text("Cancelled.")
    expect(page.get_by_text("Trying again in")).to_be_hidden()


def test_a_wait_of_hours_is_not_begun(page: Page, console: Console) -> None:
    console.expect("429")
    page.route("**/generate", refusing(9, 429, BUSY, 4000))
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("Try again in 4000 seconds.")


def test_position_and_estimate_are_shown(page: Page) -> None:
    events = [("queued", {"id": "1", "position": 3, "estimate_s": 11.2})]
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page.evaluate(
        """() => {
          window.said = [];
          new MutationObserver(() => said.push(`${document.querySelector("#status").textContent}|`
            + document.querySelector("#step").textContent)).observe(
              document.querySelector("#result"), { subtree: true, childList: true });
        }"""
    )
    page.route("**/generate", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The connection closed")
    assert "Queued: 3 ahead of you.|at most 12 s" in page.evaluate("said")


def test_a_server_with_keys_is_given_one(page: Page, console: Console) -> None:
    console.expect("401")

    def check(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            refuse(route, 401, LOCKED)

    for path in ("models", "schedulers", "generate"):
        page.route(f"**/{path}", check)
    page.reload()
    expect(page.get_by_text(LOCKED["detail"])).to_be_visible()
    key = page.get_by_label("API key", exact=True)
    expect(key).to_be_focused()
    check_accessibility(page)
    key.fill("wrong")
    key.press("Enter")
    expect(key).to_have_value("")
    key.fill("sesame")
    key.press("Enter")
    driving.generate(page)
    expect(driving.button(page, "API key")).to_be_visible()
    stored = (
        "[JSON.stringify({...localStorage}).includes('sesame'), JSON.stringify({...sessionStorage}).includes('sesame')]"
    )
    assert page.evaluate(stored) == [False, True]
    page.reload()
    driving.is_loaded(page)


def test_what_is_forbidden_is_explained(page: Page, console: Console) -> None:
    console.expect("403")
    page.route("**/generate", lambda route: route.fulfill(status=403, body="<html>no</html>"))
    driving.is_loaded(page)
    driving.prompt(page).fill(PROMPT)
    driving.button(page, "Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The server does not allow this: your API key")


def test_a_flagged_image_is_blurred_until_it_is_asked_for(page: Page) -> None:
    def flag(route: Route) -> None:
        answer = route.fetch()
        body = answer.text().replace('"nsfw_content_detected":null', '"nsfw_content_detected":true')
        route.fulfill(response=answer, body=body)

    page.route("**/generate", flag)
    driving.generate(page)
    blurred = "image => getComputedStyle(image).filter"
    assert "blur" in driving.result(page).evaluate(blurred)
    check_accessibility(page)
    driving.button(page, "This image may be unsafe. Show it").click()
    assert driving.result(page).evaluate(blurred) == "none"
    expect(thumbnails(page)).to_have_accessible_name(re.compile("may be unsafe"))
    assert "blur" in thumbnails(page).locator("img").evaluate(blurred)


def test_it_says_what_the_demo_model_can_draw(page: Page) -> None:
    driving.is_loaded(page)
    expect(page.get_by_text(re.compile(r"^The demo model: .*64 × 64 pixels.*102 objects"))).to_be_visible()


def test_prompts_come_back_with_arrow_up(page: Page) -> None:
    for text in ("a red apple", "a penguin"):
        driving.generate(page, text)
    page.reload()
    driving.is_loaded(page)
    prompt = driving.prompt(page)
    prompt.fill("")
    for key, text in (
        ("ArrowUp", "a penguin"),
        ("ArrowUp", "a red apple"),
        ("ArrowUp", "a red apple"),
        ("ArrowDown", "a penguin"),
    ):
        prompt.press(key)
        expect(prompt).to_have_value(text)
    prompt.press("ArrowDown")
    expect(prompt).to_have_value("")
    page.get_by_text("Recent prompts").click()
    driving.button(page, "a red apple").click()
    expect(prompt).to_have_value("a red apple")
    page.get_by_text("Recent prompts").click()
    driving.button(page, "Forget them").click()
    expect(page.get_by_text("Recent prompts")).to_be_hidden()
    assert page.evaluate("JSON.stringify({...localStorage}).includes('penguin')") is False
