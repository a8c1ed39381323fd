"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json

import pytest

from server.api.openai.errors import error_response, status_of
from server.requests.errors import (
    STATUS,
    DeadlineExceeded,
    FieldError,
    InvalidRequest,
    NotReady,
    QueueFull,
    ServerError,
    StepFailed,
    UnknownModel,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequest("no", fields=(FieldError("n", "no"),)), 400, "invalid_request_error", None),
        (UnknownModel("no"), 404, "invalid_request_error", "model_not_found"),
        (QueueFull("no"), 429, "requests", "rate_limit_exceeded"),
        (NotReady("no"), 503, "server_error", None),
        (StepFailed("no"), 500, "server_error", None),
    ],
)
def test_each_error_has_a_type_and_a_code(error: ServerError, status: int, kind: str, code: str | None) -> None:
    response = error_response(error)
    param = error.fields[0].field if error.fields else None
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {"error": {"message": "no", "type": kind, "param": param, "code": code}}


def test_no_error_is_422() -> None:
    assert 422 not in map(status_of, STATUS)


def test_an_expired_time_limit_is_not_retried() -> None:
    assert error_response(DeadlineExceeded("late")).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in error_response(QueueFull("full")).headers
