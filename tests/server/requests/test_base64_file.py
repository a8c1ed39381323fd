"""Files as text in JSON: what is decoded, and what is refused with the reason."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from server.requests.base64_file import decode

FILE = bytes(range(256))  # all digits of both alphabets, and two of padding
TEXT = base64.b64encode(FILE).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(FILE).decode(),
        base64.urlsafe_b64encode(FILE).decode().rstrip("="),
        base64.encodebytes(FILE).decode(),
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/SVG+xml;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;name=cat%20one.png;charset=utf-8;base64,{TEXT}",
        f"data:text/plain;base64,{TEXT.rstrip('=')}",
    ],
)
def test_a_file_is_decoded(text: str) -> None:
    assert decode(text) == FILE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "at least 1 byte"),
        ("data:;base64,", "at least 1 byte"),
        ("A", "base64"),
        ("QUJDR", "base64"),
        ("QUI", None),
        ("QU=JD", "base64"),
        ("QUI=QUI=", "base64"),
        ("QQ=", "base64"),
        ("QQ===", "base64"),
        ("QR==", None),
        ("a cat", "base64"),
        (" QUJD", "base64"),
        ("éééé", "base64"),
        ("data:image/png,QUJD", "A data: URL should be in base64"),
        ("data:,", "A data: URL should be in base64"),
        (f"data:{'x' * 2000};base64,QUJD", "A data: URL should be in base64"),
        ("data:;base64,data:;base64,QUJD", "not fetched"),
        ("https://example.org/cat.png", "not fetched"),
        (20, "as base64 text"),
        (None, "as base64 text"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text: object, words: str | None) -> None:
    if words is None:
        assert decode(text)
        return
    with pytest.raises(PydanticCustomError, match=words):
        decode(text)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text() | st.text("QUJD=-_+/\r\n"))
def test_no_text_causes_anything_but_a_refusal(text: str) -> None:
    try:
        assert decode(text)
    except PydanticCustomError as error:
        assert error.type == "image"  # noqa: PT017


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.binary(min_size=1))
def test_every_file_arrives_unchanged(content: bytes) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(content).decode()
        assert decode(text) == decode(text.rstrip("=")) == content
