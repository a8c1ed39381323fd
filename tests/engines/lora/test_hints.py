"""What files say of themselves is bounded and printable, whatever it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.lora.hints import NO_HINTS, Hints, read_hints


def test_the_metadata_of_kohya_is_read() -> None:
    tags = {"10_cat": {"a cat": 30, "red hat": 4}, "5_more": {"red hat": 40, " by\nnight ": 1}}
    metadata = {
        "ss_output_name": "cats",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "v1-5.safetensors",
        "ss_tag_frequency": json.dumps(tags),
    }
    assert read_hints(metadata) == Hints("cats", "sd_v1", "", ("red hat", "a cat", "by night"))
    spec = {"modelspec.title": "Cats", "modelspec.trigger_phrase": "a cat, sks"}
    assert read_hints(metadata | spec).title == "Cats"
    assert read_hints(spec).trigger_words == "a cat, sks"
    assert read_hints({"format": "pt"}) == NO_HINTS


@pytest.mark.parametrize(
    "tags", ["{", "[1]", "1", '{"a": [1]}', '{"a": {"b": "c"}}', '{"a": {"b": 1e999}}', "[" * 10**5]
)
def test_tags_that_are_none_are_left_out(tags: str) -> None:
    assert read_hints({"ss_tag_frequency": tags}).tags == ()


@given(st.dictionaries(st.sampled_from(["ss_output_name", "modelspec.title", "modelspec.trigger_phrase"]), st.text()))
def test_hints_are_one_printable_line(metadata: dict[str, str]) -> None:
    found = read_hints(metadata)
    assert all(text.isprintable() for text in (found.title, found.base_model, found.trigger_words))


def test_hints_are_bounded() -> None:
    many = json.dumps({"a": {f"{n} {'x' * 1000}": n for n in range(1000)}})
    found = read_hints({"ss_output_name": "\u202e\x1b[1m" + "y" * 10**6, "ss_tag_frequency": many})
    assert found.title == "[1m" + "y" * 197
    assert (len(found.tags), max(map(len, found.tags)), found.tags[0][:4]) == (20, 60, "999 ")
    assert read_hints({"ss_tag_frequency": '{"a": {"b": 1}}' + " " * (5 << 20)}).tags == ()
