"""The key in the headers of a request."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from server.access.credentials import presented_key
from server.requests.errors import Unauthenticated

KEY = "latentd_abc-DEF_123"


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def headers(*lines: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.encode(), text.encode("latin-1")) for name, text in lines])


@pytest.mark.parametrize(
    "lines",
    [
        [("authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer   {KEY} ")],
        [("authorization", basic(f"anyone:{KEY}"))],
        [("authorization", basic(f":{KEY}"))],
        [("x-api-key", KEY)],
        [("x-api-key", f" {KEY} ")],
        [("x-api-key", KEY), ("authorization", "Basic the-proxys-own")],
        [("x-api-key", ""), ("authorization", f"Bearer {KEY}")],
    ],
)
def test_each_way_is_understood(lines: list[tuple[str, str]]) -> None:
    assert presented_key(headers(*lines)) == KEY


@pytest.mark.parametrize("lines", [[], [("authorization", "")], [("x-api-key", " ")]])
def test_no_key_is_none(lines: list[tuple[str, str]]) -> None:
    assert presented_key(headers(*lines)) is None


@pytest.mark.parametrize(
    "lines",
    [
        [("authorization", KEY)],
        [("authorization", f"Digest {KEY}")],
        [("authorization", f"Basic {KEY}")],
        [("authorization", "Basic")],
        [("authorization", "Basic " + base64.b64encode(KEY.encode()).decode())],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("x-api-key", KEY), ("x-api-key", KEY)],
    ],
)
def test_what_cannot_be_read_is_refused_and_not_repeated(lines: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        presented_key(headers(*lines))
    assert KEY not in caught.value.detail


TEXT = st.text(st.characters(max_codepoint=255), max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["authorization", "x-api-key"]), TEXT), max_size=3))
def test_any_headers_give_a_key_or_a_refusal(lines: list[tuple[str, str]]) -> None:
    try:
        key = presented_key(headers(*lines))
    except Unauthenticated:
        return
    assert key is None or isinstance(key, str)


@given(user=TEXT.filter(lambda text: ":" not in text), password=TEXT)
def test_the_password_is_all_after_the_first_colon(user: str, password: str) -> None:
    line = "Basic " + base64.b64encode(f"{user}:{password}".encode("latin-1")).decode()
    assert presented_key(headers(("authorization", line))) == password
