"""Parsing of responses."""

from __future__ import annotations

import json

import httpx
import pytest

from loadtest.analysis.results import STAGES, Outcome, outcome_of
from loadtest.response_formats import (
    RESPONSE_FORMATS,
    BodyPart,
    FormatName,
    RawResponse,
    RequestResult,
    server_sent_events,
)

WHOLE = {"images": [{}], "timings": dict.fromkeys((*STAGES, "total"), 0.5)}
TIMING = ", ".join(f"{stage};dur=500.0" for stage in (*STAGES, "total"))
PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "completed"), (429, "refused"), (503, "not ready"), (422, "failed"), (500, "failed"), (302, "failed")],
)
def test_each_status_has_one_outcome(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) == outcome


def event(name: str, document: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()


def parse(name: FormatName, status: int, *contents: bytes, **headers: str) -> RequestResult:
    """Parse a response whose body arrived in pieces, a second apart."""
    parts = [BodyPart(float(second), content) for second, content in enumerate(contents, 1)]
    encoded = httpx.Headers({key.replace("_", "-"): value for key, value in headers.items()})
    return RESPONSE_FORMATS[name].parse(RawResponse(status, encoded, parts))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("json", json.dumps(WHOLE).encode()),
        ("png", PNG),
        ("events", event("completed", WHOLE)),
        ("openai", json.dumps({"data": [{}]}).encode()),
    ],
    ids=["json", "png", "events", "openai"],
)
def test_each_format_has_stages(name: FormatName, content: bytes) -> None:
    result = parse(name, 200, content[:9], content[9:], server_timing=TIMING)
    assert (result.outcome, result.stages) == ("completed", dict.fromkeys(STAGES, 0.5))
    assert result.pause == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("json", b""),
        ("json", b"[]"),
        ("json", json.dumps({**WHOLE, "images": []}).encode()),
        ("json", b'{"images": [1], "timings": {}}'),
        ("png", b"<html>"),
        ("events", b""),
        ("events", event("step", {"step": 1, "steps": 2})),
        ("events", event("completed", {**WHOLE, "images": []})),
        ("events", event("completed", WHOLE)[:-1]),  # truncated
    ],
)
def test_response_without_images_has_failed(name: FormatName, content: bytes) -> None:
    assert parse(name, 200, content, server_timing=TIMING).outcome == "failed"


def test_file_without_timings_has_failed() -> None:
    assert parse("png", 200, PNG).outcome == "failed"
    assert parse("png", 200, PNG, server_timing="queue;dur=1").outcome == "failed"


def test_event_stream_has_time_of_first_step() -> None:
    step = event("step", {"step": 1, "steps": 2})
    result = parse("events", 200, event("queued", {}), step[:5], step[5:] + b": ping\n\n", event("completed", WHOLE))
    assert result.first_step == 3.0
    assert result.outcome == "completed"


@pytest.mark.parametrize(
    ("status", "outcome", "pause"), [(429, "refused", 1.0), (503, "not ready", 1.0), (500, "failed", 1.0)]
)
def test_error_event_has_outcome_of_its_status(status: int, outcome: Outcome, pause: float) -> None:
    problem = {"title": "Gone", "status": status, "detail": "The device is lost."}
    result = parse("events", 200, event("queued", {}), event("error", problem))
    assert (result.outcome, result.status, result.detail) == (outcome, status, "The device is lost.")
    assert result.pause == pause


def test_event_lines_may_end_with_cr_lf() -> None:
    parts = [BodyPart(1.0, b": hello\r\n\r"), BodyPart(2.0, b"\nevent: a\r\ndata: 1\r\ndata:2\r\n\r\n")]
    assert list(server_sent_events(parts)) == [(2.0, "a", "1\n2")]


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("3", 3.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), (None, None)],
    ids=["s", "date", "none"],
)
def test_refusal_keeps_retry_after_and_detail(retry_after: str | None, seconds: float | None) -> None:
    result = parse("events", 429, b'{"detail": "64 wait."}', **({"retry_after": retry_after} if retry_after else {}))
    assert result.pause == (seconds or 1.0)
    assert (result.outcome, result.retry_after, result.detail) == ("refused", seconds, "64 wait.")


def test_each_event_has_the_time_of_its_last_piece() -> None:
    pieces = [b"event: a\ndata: 1\n\nevent: b\n", b"data: 2\n\n", b"data: 3\n\n"]
    parts = [BodyPart(float(second), piece) for second, piece in enumerate(pieces, 1)]
    assert list(server_sent_events(parts)) == [(1.0, "a", "1"), (2.0, "b", "2"), (3.0, "message", "3")]
