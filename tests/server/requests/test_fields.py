"""Bodies as clients of other programs write them, and every JSON value in every field; without HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engines.limits import MAX_STEPS
from server.api.problems import explain
from server.requests.errors import InvalidRequest, MalformedBody, ServerError
from server.requests.field_names import hint
from server.requests.schemas import GenerateRequest, Parameters

FIELDS = GenerateRequest.model_fields
OPTIONAL = [name for name, field in FIELDS.items() if not field.is_required()]
SCHEMAS = GenerateRequest.model_json_schema()["properties"]


def read(body: bytes | dict[str, Any]) -> GenerateRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return GenerateRequest.model_validate_json(content)
    except ValidationError as error:
        raise explain(error) from None


def refusal(body: bytes | dict[str, Any]) -> ServerError:
    with pytest.raises(ServerError) as refused:
        read(body)
    return refused.value


def complaint(field: str, value: Any) -> str:
    """What is said of `value` in `field`."""
    error = refusal({"prompt": "a", field: value})
    assert isinstance(error, InvalidRequest)
    (one,) = error.fields
    assert one.field == field
    assert error.detail == f"{field}: {one.message}"
    return one.message


SYNONYMS = {
    "num_inference_steps": ["steps", "num_steps", "Steps", "numInferenceSteps", "sampling_steps"],
    "guidance_scale": ["cfg_scale", "cfg", "guidance", "guidanceScale", "cfgScale"],
    "scheduler": ["sampler_name", "sampler", "sampler_index", "sampling_method"],
    "num_images": ["batch_size", "n", "n_iter", "num_images_per_prompt"],
    "negative_prompt": ["negative", "negativePrompt", "negative-prompt"],
    "strength": ["denoising_strength", "denoise"],
    "image": ["init_images", "init_image"],
    "mask": ["mask_image"],
    "prompt": ["inputs", "text"],
    "clip_skip": ["CLIP_stop_at_last_layers"],
    "image_format": ["output_format"],
    "width": ["w"],
    "seed": ["noise_seed"],
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in SYNONYMS.items() for name in names])
def test_a_name_of_another_program_leads_to_ours(field: str, name: str) -> None:
    assert complaint(name, 1) == f"Unknown field: use {field}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("size", "send width and height"),
        ("parameters", "send its fields beside prompt"),
        ("response_format", "Accept: application/json"),
        ("stream", "text/event-stream"),
        ("cross_attention_kwargs", "send loras, such as"),
        ("enable_hr", "width and height of a size that GET /models lists"),
        ("guidence_scale", "did you mean guidance_scale?"),
        ("num_inference_step", "did you mean num_inference_steps?"),
        ("promt", "did you mean prompt?"),
        ("hieght", "did you mean height?"),
        ("sampler_nam", "did you mean scheduler?"),
        ("zebra", "/docs lists all fields"),
        ("", "/docs lists all fields"),
        ("é\n\0", "/docs lists all fields"),
        ("x" * 100_000, "/docs lists all fields"),
    ],
)
def test_any_other_name_is_answered_with_what_to_do(name: str, words: str) -> None:
    assert words in hint(name, FIELDS)
    assert words in refusal({"prompt": "a", name: 1}).fields[0].message


def test_only_names_that_are_fields_are_suggested() -> None:
    assert hint("sampler_name", ["prompt"]) == "/docs lists all fields"


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_is_the_default(field: str) -> None:
    assert read({"prompt": "a", field: None}) == read({"prompt": "a"})
    assert {"type": "null"} in SCHEMAS[field]["anyOf"]


def test_the_prompt_is_not_null() -> None:
    assert complaint("prompt", None) == "Input should be a valid string"


CHOICES = {field: SCHEMAS[field]["anyOf"][0]["enum"] for field in OPTIONAL if "enum" in SCHEMAS[field]["anyOf"][0]}


def test_the_choices_are_known() -> None:
    assert set(CHOICES) == {
        "prompt_syntax",
        "sigmas",
        "timestep_spacing",
        "final_sigmas_type",
        "image_format",
        "cache",
        "decoder",
        "priority",
    }


@pytest.mark.parametrize(("field", "choice"), [(field, choice) for field in CHOICES for choice in CHOICES[field]])
def test_the_case_of_a_choice_does_not_matter(field: str, choice: str) -> None:
    for written in (choice, choice.upper(), choice.title()):
        assert getattr(read({"prompt": "a", field: written}), field) == choice
        assert getattr(GenerateRequest.model_validate_strings({"prompt": "a", field: written}), field) == choice


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_that_is_none_lists_those_there_are(field: str) -> None:
    assert all(repr(choice) in complaint(field, "heun") for choice in CHOICES[field])


def test_numbers_out_of_range_are_answered_with_both_bounds() -> None:
    for steps in (0, MAX_STEPS + 1):
        assert complaint("num_inference_steps", steps) == (
            f"Input should be greater than or equal to 1 and less than or equal to {MAX_STEPS}"
        )
    assert complaint("guidance_start", 1) == "Input should be greater than or equal to 0 and less than 1"
    assert complaint("guidance_end", 0) == "Input should be greater than 0 and less than or equal to 1"
    assert complaint("width", 4).endswith("to 8 and less than or equal to 8192")


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_out_of_range_says_how_to_get_a_random_one(seed: int) -> None:
    message = complaint("seed", seed)
    assert message.endswith("to 4294967295: leave it out for a random one")


PROMPT = '{"prompt": "é"}'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PROMPT.encode("utf-8-sig"), "byte-order mark: send UTF-8"),
        (PROMPT.encode("utf-16"), "UTF-16 or UTF-32: send UTF-8"),
        (PROMPT.encode("utf-16-le"), "UTF-16 or UTF-32: send UTF-8"),
        (PROMPT.encode("utf-16-be"), "UTF-16 or UTF-32: send UTF-8"),
        (PROMPT.encode("utf-32"), "UTF-16 or UTF-32: send UTF-8"),
        (PROMPT.encode("latin-1"), "byte 12 is not UTF-8: send UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "is not UTF-8: send UTF-8"),
        (b'{"prompt": ', "EOF while parsing"),
        (b"", "EOF while parsing"),
    ],
)
def test_a_body_that_is_not_utf8_is_told_so(body: bytes, words: str) -> None:
    error = refusal(body)
    assert isinstance(error, MalformedBody)
    assert error.detail.startswith("Invalid JSON: ")
    assert words in error.detail


VALUES = {
    "null": b"null",
    "a bool": b"true",
    "a text": b'"cat"',
    "an integer": b"7",
    "a negative number": b"-3.5",
    "a list": b"[1, 2]",
    "an object": b'{"a": 1}',
    "a huge integer": b"9" * 400,
    "beyond float64": b"1e400",
    "NaN": b"NaN",
    "-Infinity": b"-Infinity",
    "nested too deep": b"[" * 100_000 + b"]" * 100_000,
    "a lone surrogate": rb'"\ud800"',
    "a NUL": rb'"\u0000"',
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("field", [*FIELDS, "steps"])
def test_every_value_of_every_field_is_read_or_refused_by_name(field: str, value: bytes) -> None:
    try:
        read(b'{"prompt": "a", "%s": %s}' % (field.encode(), value))
    except MalformedBody as error:
        assert "Invalid JSON" in error.detail  # noqa: PT017 - any outcome is right, if it is said
    except InvalidRequest as error:
        assert error.fields[0].field.partition(".")[0] == field  # noqa: PT017


def test_of_a_key_that_occurs_twice_the_last_counts() -> None:
    assert read(b'{"prompt": "a", "seed": 1, "prompt": "b", "seed": 2}') == read({"prompt": "b", "seed": 2})
    assert refusal(b'{"prompt": "a", "seed": 1, "seed": "x"}').fields[0].field == "seed"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
bodies = st.dictionaries(st.sampled_from([*FIELDS, *Parameters.model_fields]) | st.text(max_size=9), json_values)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(bodies)
def test_no_body_causes_anything_but_a_refusal(body: dict[str, Any]) -> None:
    try:
        read(json.dumps(body).encode("utf-8", "surrogatepass"))
    except ServerError as error:
        assert isinstance(error, InvalidRequest | MalformedBody)  # noqa: PT017
        assert len(error.detail) < 500  # noqa: PT017


def test_the_readme_and_the_web_page_state_the_bound_of_the_steps() -> None:
    root = Path(__file__).parents[3]
    assert f"| `num_inference_steps` | the model's | 1 to {MAX_STEPS} |" in (root / "README.md").read_text("utf-8")
    page = (root / "server/playground/index.html").read_text("utf-8")
    assert f'name="num_inference_steps" type="number" min="1" max="{MAX_STEPS}"' in page
