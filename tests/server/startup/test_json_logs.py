"""Logs as JSON, and what they never hold, from a running server."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from engines.demo import BUNDLE
from engines.errors import EngineError
from server.runtime.failures import failed
from server.startup.json_logs import JsonFormatter
from server.startup.log_repeats import Repeats
from server.startup.logs import LogHandler
from tests.support.serving import Serving, run_server

WORD = "zweihundert"  # of a prompt


def formatted(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def record(message: object, *values: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("latentd").makeRecord("latentd", 30, __file__, 1, message, values, None, extra=extra)


def test_a_message_is_an_object_on_one_line() -> None:
    found = formatted(record("two\n%s \udcff é", "lines", fields={"request_id": "seven"}))
    assert datetime.fromisoformat(found.pop("time")).utcoffset() == timedelta(0)
    assert found == {
        "level": "WARNING",
        "logger": "latentd",
        "message": "two\nlines \udcff é",
        "request_id": "seven",
    }


def test_an_exception_has_its_traceback() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        failed = logging.getLogger("a").makeRecord("a", 40, __file__, 1, "no", (), sys.exc_info())
    found = formatted(failed)
    assert found["message"] == "no"
    assert found["exception"].endswith("ValueError: broken")


def test_failures_name_their_requests(caplog: pytest.LogCaptureFixture) -> None:
    failed(EngineError("out of memory"), "seven, eight")
    failed(ValueError("a bug"), "nine")
    assert [formatted(found)["request_id"] for found in caplog.records] == ["seven, eight", "nine"]


def test_repetitions_and_losses_are_objects_too() -> None:
    reading, writing = os.pipe()
    handler = LogHandler(writing, repeats=Repeats(burst=2))
    handler.setFormatter(JsonFormatter())
    for number in range(9):
        handler.emit(record("again %d", number))
    handler.flush()
    handler.close()
    os.close(writing)
    with os.fdopen(reading) as lines:
        messages = [json.loads(line)["message"] for line in lines]
    assert messages == ["again 0", "again 1", "again 0 (repeated 7 more times within 30 s)"]


def test_an_error_at_the_start_is_an_object() -> None:
    ended = run_server("--bundle", "/nowhere", "--log-format", "json")
    (line,) = ended.stderr.splitlines()
    assert (json.loads(line)["level"], ended.returncode) == ("ERROR", 1)


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with Serving(BUNDLE, "--log-format", "json", "--log-level", "debug") as running:
        yield running


def test_every_line_of_a_server_is_an_object(serving: Serving) -> None:
    answer = serving.client.post(
        "/generate", json={"prompt": WORD, "num_inference_steps": 1}, headers={"X-Request-Id": "seven"}
    )
    assert answer.status_code == 200
    serving.client.get("/nowhere?q=1")
    lines = messages_until(serving, path="/nowhere")
    (ready,) = [line for line in lines if "is ready" in line["message"]]
    assert ready["level"] == "INFO"
    (line,) = [line for line in lines if line.get("request_id") == "seven" and line["logger"] == "latentd.access"]
    assert line.items() >= {"method": "POST", "path": "/generate", "status": 200, "api": "generate"}.items()
    assert line["seconds"] > 0


def test_no_message_has_a_prompt(serving: Serving) -> None:
    """At the most talkative level, whatever becomes of the request."""
    asked = {"prompt": WORD, "negative_prompt": WORD, "num_inference_steps": 1}
    for fields in (
        asked,
        {**asked, "seed": WORD},
        {**asked, WORD: 1},
        {**asked, "scheduler": WORD},
        {**asked, "image": WORD},
        {**asked, "prompt_syntax": WORD},
        {**asked, "num_images": 64},
    ):
        serving.generate(**fields)
        serving.client.post("/generate", data={key: str(value) for key, value in fields.items()}, files={"x": b"1"})
        serving.client.post("/generate", json=fields, headers={"Accept": "text/event-stream"})
    serving.client.post("/generate", content=f'{{"prompt": "{WORD}', headers={"Content-Type": "application/json"})
    serving.client.get(f"/generate?prompt={WORD}")
    serving.client.get("/the-end")
    messages_until(serving, path="/the-end")
    assert WORD not in "".join(serving.stderr)


def test_prompts_are_logged_where_that_is_asked_for() -> None:
    with Serving(BUNDLE, "--log-prompts") as serving:
        asked = {"prompt": 'a "boat"\n2026 ERROR', "negative_prompt": "a bird", "num_inference_steps": 1}
        answer = serving.client.post("/generate", json=asked, headers={"X-Request-Id": "seven"})
        assert answer.status_code == 200
        serving.stop()
    (line,) = [line for line in serving.stderr if "latentd.prompts" in line]
    assert line.endswith('request seven of 127.0.0.1: "a \\"boat\\"\\n2026 ERROR" without "a bird"\n')


def messages_until(serving: Serving, *, path: str) -> list[dict[str, Any]]:
    """All messages, once the line of the request to `path` is there: it is logged after its answer."""
    for _ in range(10_000):
        lines = tuple(serving.stderr)
        if any(f'"{path}"' in line for line in lines):
            return [json.loads(line) for line in lines]
        serving.client.get("/v2/health/live")
    raise AssertionError(f"no line of {path}")
