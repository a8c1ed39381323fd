"""The sizes that condition Stable Diffusion XL: their defaults, bounds and forms, and models without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engines.manifest import Manifest
from server.requests.errors import InvalidRequest
from server.requests.intake import Intake
from server.requests.params import GenerationParams
from server.requests.schemas import SIZE_CONDITIONS, GenerateRequest, Parameters
from server.requests.tokenizer import PromptTokenizer

SENT = {"original_size": [64, 96], "crops_coords_top_left": [0, 7], "target_size": [40, 24]}


def params(bundle: Path, **fields: Any) -> GenerationParams:
    manifest = Manifest.read(bundle)
    tokenizer = PromptTokenizer(
        bundle / manifest.tokenizer.file.path,
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        pad_2=manifest.tokenizer.pad_2,
    )
    body = GenerateRequest.model_validate({"prompt": "a red cat", "seed": 1, **fields})
    return Intake(manifest, tokenizer).request(body).params


def test_left_out_they_are_the_size_of_the_image(xl_bundle: Path) -> None:
    assert params(xl_bundle, width=48, height=32).unet_inputs == {"time_ids": (32, 48, 0, 0, 32, 48)}


def test_an_answer_repeats_them(xl_bundle: Path) -> None:
    sent = params(xl_bundle, **SENT)
    assert sent.unet_inputs == {"time_ids": (64, 96, 0, 7, 40, 24)}
    answered = Parameters.of(sent).model_dump(mode="json")
    assert {name: answered[name] for name in SENT} == SENT
    assert params(xl_bundle, **answered).unet_inputs == sent.unet_inputs


@pytest.mark.parametrize("name", SIZE_CONDITIONS)
def test_a_model_without_them_refuses_them_by_name(bundle: Path, name: str) -> None:
    assert params(bundle, **dict.fromkeys(SENT)).unet_inputs == {}
    with pytest.raises(InvalidRequest, match=f"This model has no {name}.*: leave it out") as refused:
        params(bundle, **{name: SENT[name]})
    assert [error.field for error in refused.value.fields] == [name]


@pytest.mark.parametrize("name", SIZE_CONDITIONS)
def test_forms_have_them_as_json(name: str) -> None:
    read = GenerateRequest.model_validate_strings({"prompt": "a", name: str(SENT[name])})
    assert getattr(read, name) == tuple(SENT[name])


@pytest.mark.parametrize("value", [[8193, 8], [-1, 8], [8], [8, 8, 8], [8.0, 8], [True, 8], "8x8", 8, {"height": 8}])
@pytest.mark.parametrize("name", SIZE_CONDITIONS)
def test_other_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        GenerateRequest.model_validate({"prompt": "a", name: value})


@pytest.mark.parametrize(("text", "zeros"), [("", True), (" \n", True), ("rain", False), ("()", False)])
def test_an_empty_negative_prompt_weighs_nothing(xl_bundle: Path, bundle: Path, text: str, zeros: bool) -> None:
    made = params(xl_bundle, negative_prompt=text, prompt="")
    assert [not any(chunk.weights) for chunk in made.negative_prompt.chunks] == [zeros]
    assert all(made.prompt.chunks[0].weights), "an empty prompt is encoded"
    assert all(params(bundle, negative_prompt=text).negative_prompt.chunks[0].weights)
