"""Which LoRAs a request gets, by its field and by the tags of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from engines.manifest import LoraCapacity, Manifest
from server.requests.errors import InvalidRequest
from server.requests.intake import Intake
from server.requests.loras import KnownLora, UnusableLora
from server.requests.params import Lora
from server.requests.request import Request
from server.requests.schemas import GenerateRequest, LoraDescription, Parameters
from server.requests.tokenizer import PromptTokenizer

RANKS = {"ink": 4, "styles/wash": 4, "large": 9}


class Folder:
    """LoRAs by name, and by the last part of it, as the catalogue has them."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def find(self, name: str) -> KnownLora:
        for known, ranks in RANKS.items():
            if name in (known, known.split("/")[-1]):
                return KnownLora(known, ranks)
        raise UnusableLora(f"There is no LoRA {name}.")

    def describe(self) -> list[LoraDescription]:
        return []

    def load(self, name: str) -> Lora:
        self.loaded.append(name)
        return Lora(
            name, "0" * 64, np.zeros((RANKS[name], 2), np.float16), updates_unet=True, updates_text_encoder=True
        )


@pytest.fixture(scope="module")
def tokenizer(bundle: Path, manifest: Manifest) -> PromptTokenizer:
    context, tokenizer = manifest.context, manifest.tokenizer
    return PromptTokenizer(bundle / tokenizer.file.path, tokens=context.tokens, pad=tokenizer.pad)


@pytest.fixture
def accept(manifest: Manifest, tokenizer: PromptTokenizer) -> Callable[..., Request]:
    """Make a request of a model with room for 8 ranks in a row."""
    able = manifest.model_copy(update={"lora": LoraCapacity(slots=2, rank=4)})
    intake = Intake(able, tokenizer, loras=Folder())
    return lambda **fields: intake.request(GenerateRequest.model_validate({"seed": 1, **fields}))


def chosen(request: Request) -> dict[str, float]:
    return {lora.name: weight for lora, weight in request.params.loras}


def test_tags_and_the_field_choose_loras(accept: Callable[..., Request]) -> None:
    request = accept(prompt="a cat <lora:ink:0.5>", loras=[{"name": "wash", "weight": -1}])
    assert chosen(request) == {"ink": 0.5, "styles/wash": -1.0}
    assert request.ranks == 8
    assert request.params.prompt.text == "a cat <lora:ink:0.5>"
    assert request.params.prompt.chunks == accept(prompt="a cat ").params.prompt.chunks
    assert request.params.warnings == []


def test_a_file_that_grew_before_it_was_loaded_is_refused(
    accept: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines take no more ranks: a step with them would fail for everyone."""
    grown = Lora("ink", "0" * 64, np.zeros((9, 2), np.float16), updates_unet=True, updates_text_encoder=True)
    monkeypatch.setattr(Folder, "load", lambda _folder, _name: grown)
    with pytest.raises(InvalidRequest, match="ink has rank 9: this model takes ranks of 8 in all"):
        accept(prompt="a cat <lora:ink>")


def test_without_loras_there_are_none(accept: Callable[..., Request]) -> None:
    request = accept(prompt="a <b> cat", loras=None)
    assert (request.params.loras, request.ranks) == ((), 0)


def test_weights_of_one_lora_add_up_and_the_fields_count(accept: Callable[..., Request]) -> None:
    assert chosen(accept(prompt="<lora:wash:0.5><lora:styles/wash:0.25>")) == {"styles/wash": 0.75}
    assert chosen(accept(prompt="<lora:ink:0.5>", loras=[{"name": "ink", "weight": 0.8}])) == {"ink": 0.8}
    assert chosen(accept(prompt="", loras=[{"name": "ink"}, {"name": "ink", "weight": 0.5}])) == {"ink": 1.5}


def test_a_weight_of_zero_is_none(accept: Callable[..., Request]) -> None:
    assert chosen(accept(prompt="<lora:ink:1><lora:ink:-1><lora:large:0>")) == {}


def test_parameters_are_the_same_request_again(accept: Callable[..., Request]) -> None:
    request = accept(prompt="a cat <lora:ink:0.5>", loras=[{"name": "wash", "weight": -1}])
    parameters = Parameters.of(request.params)
    assert [choice.model_dump() for choice in parameters.loras] == [
        {"name": "ink", "weight": 0.5},
        {"name": "styles/wash", "weight": -1.0},
    ]
    again = accept(**parameters.model_dump(mode="json"))
    assert chosen(again) == chosen(request)
    assert again.params.prompt == request.params.prompt


def test_the_negative_prompt_and_plain_text_have_no_tags(accept: Callable[..., Request]) -> None:
    request = accept(prompt="a cat", negative_prompt="<lora:ink:1> dog")
    assert chosen(request) == {}
    (warning,) = request.params.warnings
    assert warning.startswith('negative_prompt: "<lora:ink:1>" is treated as text: LoRAs are named in the prompt')
    plain = accept(prompt="<lora:ink:1>", prompt_syntax="plain")
    assert (chosen(plain), plain.params.warnings) == ({}, [])
    assert chosen(accept(prompt="x", prompt_syntax="plain", loras=[{"name": "ink"}])) == {"ink": 1.0}


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        ({"prompt": "<lora:oil:1>"}, "prompt", "There is no LoRA oil."),
        ({"loras": [{"name": "oil"}]}, "loras", "There is no LoRA oil."),
        ({"prompt": "<lora:ink:high>"}, "prompt", "its weight is not a number"),
        ({"prompt": "<lora:ink:9><lora:ink:9>"}, "prompt", "The weights of ink add up to more than 10: lower them."),
        ({"prompt": "<lora:large:1>"}, "prompt", "large has rank 9: this model takes ranks of 8 in all"),
        (
            {"prompt": "<lora:ink:1>", "loras": [{"name": "large"}]},
            "loras",
            "ink has rank 4, large has rank 9: this model takes ranks of 8 in all: ask for fewer or smaller LoRAs.",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    accept: Callable[..., Request], fields: dict[str, Any], field: str, why: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        accept(**{"prompt": "a cat", **fields})
    assert [error.field for error in caught.value.fields] == [field]
    assert why in caught.value.detail


def test_nothing_is_read_for_a_request_that_does_not_fit(manifest: Manifest, tokenizer: PromptTokenizer) -> None:
    folder = Folder()
    able = manifest.model_copy(update={"lora": LoraCapacity(slots=1, rank=4)})
    with pytest.raises(InvalidRequest):
        Intake(able, tokenizer, loras=folder).request(GenerateRequest(prompt="<lora:ink:1><lora:wash:1>"))
    assert folder.loaded == []


def test_a_server_without_loras_reads_tags_as_text(manifest: Manifest, tokenizer: PromptTokenizer) -> None:
    intake = Intake(manifest, tokenizer)
    (warning,) = intake.request(GenerateRequest(prompt="<lora:ink:1>")).params.warnings
    assert "is treated as text" in warning
    assert "--loras" in warning
    with pytest.raises(InvalidRequest, match="start it with --loras DIR"):
        intake.request(GenerateRequest.model_validate({"prompt": "", "loras": [{"name": "ink"}]}))


def test_a_model_without_room_for_loras_says_so(manifest: Manifest, tokenizer: PromptTokenizer) -> None:
    intake = Intake(manifest, tokenizer, loras=Folder())
    for fields in ({"prompt": "<lora:ink:1>"}, {"prompt": "", "loras": [{"name": "ink"}]}):
        with pytest.raises(InvalidRequest, match="built without --lora-slots"):
            intake.request(GenerateRequest.model_validate(fields))


def test_only_bodies_that_may_name_loras_are_read_in_a_thread(manifest: Manifest, tokenizer: PromptTokenizer) -> None:
    intake = Intake(manifest, tokenizer, loras=Folder())
    assert intake.reads_files(GenerateRequest(prompt="a <lora:ink:1>"))
    assert intake.reads_files(GenerateRequest.model_validate({"prompt": "", "loras": [{"name": "ink"}]}))
    assert not intake.reads_files(GenerateRequest(prompt="a cat"))
    assert not intake.reads_files(GenerateRequest(prompt="<lora:ink:1>", prompt_syntax="plain"))
    assert not Intake(manifest, tokenizer).reads_files(GenerateRequest(prompt="<lora:ink:1>"))


@pytest.mark.parametrize(
    "loras",
    [
        [{"name": ""}],
        [{"name": "a" * 301}],
        [{"name": 1}],
        [{"weight": 1}],
        [{"name": "ink", "weight": "1"}],
        [{"name": "ink", "weight": 10.5}],
        [{"name": "ink", "weight": None}],
        [{"name": "ink", "scale": 1}],
        [{"name": "ink"}] * 17,
        ["ink"],
        {"ink": 1},
        "ink",
        1,
    ],
)
def test_bounds_of_the_field(loras: object) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompt": "", "loras": loras})


def test_a_form_sends_them_as_json() -> None:
    body = GenerateRequest.model_validate_strings({"prompt": "", "loras": '[{"name": "ink", "weight": 0.5}]'})
    assert [choice.model_dump() for choice in body.loras] == [{"name": "ink", "weight": 0.5}]
    for text in ("[" * 100_000, "ink", "{", "NaN"):
        with pytest.raises(ValidationError):
            GenerateRequest.model_validate_strings({"prompt": "", "loras": text})
