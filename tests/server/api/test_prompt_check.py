"""The operator's check of prompts: its reason is the caller's, its failures are the log's, and the loop goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from server.api.prompt_check import PromptCheck
from server.requests.errors import InternalError, PromptRefused
from tests.support.prompt_checks import refuse_boats


def check(function: Any, *prompts: str) -> None:
    asyncio.run(PromptCheck(function, "ours")(*prompts))


def test_none_lets_a_prompt_through() -> None:
    check(refuse_boats, "a bird", "")


@pytest.mark.parametrize("reason", ["no", ""])
def test_a_reason_refuses_it(reason: str) -> None:
    with pytest.raises(PromptRefused) as refused:
        check(lambda _prompt, _negative: reason, "a bird", "")
    assert refused.value.detail == reason


def test_a_failure_refuses_it_and_logs_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InternalError):
        check(refuse_boats, "a bird", "a secret")
    assert "ours raised ValueError" in caplog.text
    assert "refuse_boats" in caplog.text, "where it failed"
    assert "a secret" not in caplog.text


@pytest.mark.parametrize("returned", [False, True, 1, b"no"])
def test_anything_else_is_a_failure(returned: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with pytest.raises(InternalError):
        check(lambda _prompt, _negative: returned, "a bird", "")
    assert "return None, or the reason to refuse" in caplog.text


def test_the_event_loop_goes_on_while_it_thinks() -> None:
    seen = threading.Event()

    def waits(_prompt: str, _negative_prompt: str) -> str | None:
        return None if seen.wait(30) else "the loop was blocked"

    async def both() -> None:
        waiting = asyncio.ensure_future(PromptCheck(waits, "ours")("a bird", ""))
        await asyncio.sleep(0)
        seen.set()  # which only a loop that goes on can do
        await waiting

    asyncio.run(both())
