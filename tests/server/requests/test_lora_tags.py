"""Tags of LoRAs: the web UI's grammar, and what of it is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.limits import PROMPT_LENGTH
from server.requests.errors import InvalidRequest
from server.requests.lora_tags import LoraTag, can_be_named, tag_of, tags_in, without_tags

EXTRA_NETWORK = re.compile(r"<(\w+):([^>]+)>")  # how the web UI finds tags, by its source


@pytest.mark.parametrize(
    ("prompt", "tags", "encoded"),
    [
        ("a cat <lora:ink:0.8>", [LoraTag("ink", 0.8)], "a cat "),
        ("<lora:ink> a cat", [LoraTag("ink", 1.0)], " a cat"),
        ("a<lora:ink:.5>cat", [LoraTag("ink", 0.5)], "acat"),
        ("(a cat<lora:ink:1>:1.2)", [LoraTag("ink", 1.0)], "(a cat:1.2)"),
        ("<lyco:ink:-1><LORA:wash:2>", [LoraTag("ink", -1.0), LoraTag("wash", 2.0)], ""),
        ("<lora:some style/ink v2:0.8>", [LoraTag("some style/ink v2", 0.8)], ""),
        ("<lora: ink : 0.8 >", [LoraTag("ink", 0.8)], ""),
        ("<lora:ink:0.5:0.5>", [LoraTag("ink", 0.5)], ""),
        ("<lora:ink:te=0.5:unet=0.5>", [LoraTag("ink", 0.5)], ""),
        ("<lora:ink:1><lora:ink:1>", [LoraTag("ink", 1.0), LoraTag("ink", 1.0)], ""),
        ("<lora:> <lora <hypernet:a:1> <lora:<a>:1>", [], "<lora:> <lora <hypernet:a:1> <lora:<a>:1>"),
    ],
)
def test_tags_are_taken_out_of_the_prompt(prompt: str, tags: list[LoraTag], encoded: str) -> None:
    assert tags_in(prompt) == tags
    assert without_tags(prompt) == encoded


@pytest.mark.parametrize(
    "prompt", ["a cat <lora:ink:0.8>, <lora:b> in\n<lyco:c:1> ink", "<lora:a:1", "a > b <lora:c:1>"]
)
def test_the_web_ui_encodes_the_same_text(prompt: str) -> None:
    assert without_tags(prompt) == EXTRA_NETWORK.sub("", prompt)


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<lora:ink:high>", "its weight is not a number from -10 to 10"),
        ("<lora:ink:>", "its weight is not a number"),
        ("<lora:ink:nan>", "its weight is not a number"),
        ("<lora:ink:1e400>", "its weight is not a number"),
        ("<lora:ink:11>", "its weight is not a number"),
        ("<lora:ink:0.5:1>", "weights of the text encoder and the UNet cannot differ"),
        ("<lora:ink:te=0:unet=1>", "weights of the text encoder and the UNet cannot differ"),
        ("<lora:ink:1:1:8>", "it has 3 weights"),
        ("<lora:ink:1:dyn=8>", "dyn is not supported"),
        ("<lora:ink:1:lbw=OUTALL>", "lbw is not supported"),
    ],
)
def test_what_cannot_be_followed_is_refused(tag: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f'"{tag}": {why}')) as caught:
        tags_in(f"a cat {tag}")
    assert [field.field for field in caught.value.fields] == ["prompt"]


@given(st.text(), st.floats(-10, 10).map(lambda weight: float(f"{weight:g}")))
def test_a_name_that_can_be_named_is_read_back(name: str, weight: float) -> None:
    if can_be_named(name):
        assert tags_in(tag_of(name, weight)) == [LoraTag(name, weight)]
        assert without_tags(tag_of(name, weight)) == ""


@pytest.mark.parametrize("name", ["", " ink", "a:b", "a<b", "a>b", "a\nb", "a\0b", "\ud800"])
def test_names_that_tags_cannot_have(name: str) -> None:
    assert not can_be_named(name)


@pytest.mark.parametrize("opening", ["<lora:", "<lora:a", "<lora:a:", "<", "<lora:a:1>"])
def test_reading_is_linear(opening: str) -> None:
    prompt = (opening * PROMPT_LENGTH)[: 100 * PROMPT_LENGTH]
    began = time.process_time()
    without_tags(prompt)
    assert time.process_time() - began < 2
