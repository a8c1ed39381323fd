"""Errors in FastAPI's shape."""

from __future__ import annotations

import json

import pytest

from server.api.sdapi.errors import error_response, in_its_words, rejected, responses
from server.requests.errors import STATUS, FieldError, InvalidRequest, QueueFull


def test_invalid_fields_are_a_list() -> None:
    response = error_response(rejected("override_settings.sd_vae", "Leave it out."))
    assert response.status_code == 422
    (item,) = json.loads(bytes(response.body))["detail"]
    assert item == {"loc": ["body", "override_settings", "sd_vae"], "msg": "Leave it out.", "type": "value_error"}


def test_other_errors_are_a_sentence() -> None:
    response = error_response(QueueFull("64 requests are waiting."))
    assert (response.status_code, json.loads(bytes(response.body))) == (429, {"detail": "64 requests are waiting."})


@pytest.mark.parametrize(("ours", "its"), [("num_inference_steps", "steps"), ("strength", "denoising_strength")])
def test_fields_have_the_web_uis_names(ours: str, its: str) -> None:
    message = "increase num_inference_steps or strength."
    error = in_its_words(InvalidRequest(message, fields=(FieldError(ours, message),)))
    assert error.fields[0] == FieldError(its, "increase steps or strength.")
    assert error.detail == "increase steps or strength."


def test_every_status_is_described() -> None:
    assert responses().keys() == {*STATUS.values()}
