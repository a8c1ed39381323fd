"""What a request seems to need, read without parsing it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from latentd_serve.forwarding import Wanted
from latentd_serve.wanted import wanted_by


def _wanted(path: str = "/generate", **fields: Any) -> Wanted:
    return wanted_by({"path": path}, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({"prompt": "a heart"}, ""),
        ({"prompt": "a heart", "model": "xl"}, "xl"),
        ({"prompt": 'say "model": "other"', "model": "xl"}, "xl"),
        ({"prompt": 'say "model": "other"'}, ""),
        ({"model": None}, ""),
    ],
)
def test_the_model_of_json_is_its_field_and_not_text_of_a_prompt(fields: dict[str, Any], model: str) -> None:
    assert _wanted(**fields).model == model


def test_the_model_of_a_form_is_its_field() -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nxl\r\n--x--\r\n'
    assert wanted_by({"path": "/v1/images/edits"}, body).model == "xl"


def test_the_model_of_a_path_comes_before_the_body() -> None:
    assert _wanted("/v2/models/xl/ready", model="sd").model == "xl"


def test_loras_are_those_of_the_list_and_of_tags_without_folders() -> None:
    wanted = _wanted(prompt="a heart <lora:styles/ink:0.8>", loras=[{"name": "people/ann", "weight": 1}])
    assert wanted.loras == ("ann", "ink")


def test_a_body_of_megabytes_is_looked_through_quickly() -> None:
    body = json.dumps({"image": "A" * 30_000_000, "model": "xl"}).encode()
    began = time.process_time()
    assert wanted_by({"path": "/generate"}, body).model == "xl"
    assert time.process_time() - began < 2
