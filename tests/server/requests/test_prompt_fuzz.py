"""Any prompt, from JSON to token ids: chunks and warnings, or a refusal, in bounded time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import engines.demo
from engines.limits import PROMPT_LENGTH
from server.api.problems import explain
from server.requests.errors import InvalidRequest, MalformedBody
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import CHUNK_COUNTS, PromptTokenizer

TOKENS = 77


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(Path(engines.demo.__file__).parent / "tokenizer.json", tokens=TOKENS, pad=0)


def check(tokenizer: PromptTokenizer, prompt: str) -> None:
    """Read a body with `prompt`, and tokenize it in both syntaxes."""
    try:
        body = GenerateRequest.model_validate_json(json.dumps({"prompt": prompt}))
    except ValidationError as error:
        assert isinstance(explain(error), InvalidRequest | MalformedBody)  # noqa: PT017
        return
    for text in (body.prompt, body.prompt.upper()):
        for made in (tokenizer(text), tokenizer(text, syntax="plain")):
            assert len(made.chunks) in CHUNK_COUNTS
            assert all(len(chunk.ids) == TOKENS for chunk in made.chunks)
            assert all(abs(weight) <= 10 for chunk in made.chunks for weight in chunk.weights)
            assert all(len(warning) < 300 for warning in made.warnings)


HOSTILE = {
    "open brackets": "(" * PROMPT_LENGTH,
    "square brackets": "[" * PROMPT_LENGTH,
    "nested": "(" * (PROMPT_LENGTH // 2) + ")" * (PROMPT_LENGTH // 2),
    "nested weights": "(" * 600 + "a" + ":9.9)" * 600,
    "crossing": "([" * 1000 + ")]" * 1000,
    "huge weight": "(a:1e999)",
    "weight of 3000 digits": f"(a:{'9' * 3000})",
    "weight of 3000 zeros": f"(a:0.{'0' * 3000}1)",
    "negative weights": "(a:-99999)" * 300,
    "not a number": "(a:nan)(b:inf)(c:-inf)",
    "backslashes": "\\" * PROMPT_LENGTH,
    "breaks": "BREAK " * (PROMPT_LENGTH // 6),
    "alternations": "[a|" * (PROMPT_LENGTH // 3),
    "tags": "<lora:" * (PROMPT_LENGTH // 6),
    "closed tags": "<a:<b>>" * (PROMPT_LENGTH // 7),
    "one word": "x" * PROMPT_LENGTH,
    "commas": "," * PROMPT_LENGTH,
    "control characters": "".join(map(chr, range(32))) * 100,
    "combining marks": "e" + "\u0301" * (PROMPT_LENGTH - 1),
    "emoji": "👩\u200d👩\u200d👧" * 500,
    "a lone surrogate": "\ud800",
    "reversed surrogates": "\udc00\ud800",
    "noncharacters": "\ufffe\uffff\U0010ffff" * 1000,
    "right to left": "\u202e\u2066" * 1000,
    "special tokens": "<|startoftext|><|endoftext|>" * 100,
    "too long": "a" * (PROMPT_LENGTH + 1),
}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_prompt_takes_bounded_time(tokenizer: PromptTokenizer, prompt: str) -> None:
    begin = time.process_time()
    check(tokenizer, prompt)
    assert time.process_time() - begin < 5


scraps = ["((", "[", "]", "))", ":1e999)", ":-0)", "\\", " BREAK ", "|", "<lora:", ">", "\ud800", "\0", "猫", "9" * 99]
texts = st.text() | st.text(st.characters(codec=None), max_size=40) | st.lists(st.sampled_from(scraps)).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(prompt=texts)
def test_no_prompt_causes_anything_but_a_refusal(tokenizer: PromptTokenizer, prompt: str) -> None:
    check(tokenizer, prompt)
