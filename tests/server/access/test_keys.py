"""What a file of keys may say."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access import keys
from server.access.keys import KeyFileError
from server.requests.context import Allowance, Caller

HASH = "0" * 64


def file(*lines: str) -> bytes:
    return "\n".join(["[[keys]]", *lines]).encode()


def test_a_new_key_is_found_by_itself_alone() -> None:
    mine, other = keys.new_key(), keys.new_key()
    callers = keys.parse((keys.entry("me", mine, admin=True) + keys.entry("you", other, admin=False)).encode())
    assert keys.find(callers, mine) == Caller("me", is_admin=True)
    assert keys.find(callers, other) == Caller("you")
    for wrong in ("", "x", mine[:-1], mine + "=", mine.lower(), keys.digest(mine), "\udcff"):
        assert keys.find(callers, wrong) is None


def test_a_file_holds_no_key() -> None:
    key = keys.new_key()
    assert key not in keys.entry("me", key, admin=False)
    assert len(key.removeprefix("latentd_")) >= 43, "characters of 6 bits each: 256 bits"


def test_keys_of_one_name_are_one_caller() -> None:
    old, new = keys.new_key(), keys.new_key()
    callers = keys.parse((keys.entry("me", old, admin=False) + keys.entry("me", new, admin=False)).encode())
    assert keys.find(callers, old) == keys.find(callers, new)


def test_a_key_may_have_limits_of_its_own() -> None:
    callers = keys.parse(file('name = "me"', f'sha256 = "{HASH}"', 'rate = "5/minute"', "concurrency = 2"))
    assert callers[HASH] == Caller("me", allowance=Allowance("5/minute", 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "keys: Field required"),
        (b"# nothing", "keys: Field required"),
        (b"keys = []", "keys: "),
        (b"[[keys]", "not valid TOML"),
        (b"\xff", "not UTF-8"),
        (file('name = "me"'), "keys[0].sha256: Field required"),
        (file(f'sha256 = "{HASH}"'), "keys[0].name: Field required"),
        (file('name = "a b"', f'sha256 = "{HASH}"'), "keys[0].name: write letters"),
        (file('name = ""', f'sha256 = "{HASH}"'), "keys[0].name: write letters"),
        (file('name = "me"', f'sha256 = "{HASH}"', "admin = 1"), "keys[0].admin: "),
        (file('name = "me"', f'sha256 = "{HASH}"', "concurrency = 0"), "keys[0].concurrency: "),
        (file('name = "me"', f'sha256 = "{HASH}"', 'rate = "often"'), "'often' is not a rate: write 60/minute"),
        (file('name = "me"', f'sha256 = "{HASH}"', 'rate = "5/minute;9/day"'), "is not a rate"),
        (file('name = "me"', f'sha256 = "{HASH}"', 'rate = "0/minute"'), "out of bounds"),
        (file('name = "me"', f'sha256 = "{HASH}"', "scopes = []"), "keys[0].scopes: Extra"),
        (
            file('name = "a"', f'sha256 = "{HASH}"') + b"\n" + file('name = "b"', f'sha256 = "{HASH}"'),
            "the same sha256",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(content: bytes, words: str) -> None:
    with pytest.raises(KeyFileError, match=r"^[^\n]+$") as caught:
        keys.parse(content)
    assert words in str(caught.value)


def test_a_key_in_place_of_its_hash_is_not_repeated() -> None:
    key = keys.new_key()
    with pytest.raises(KeyFileError) as caught:
        keys.parse(file('name = "me"', f'sha256 = "{key}"'))
    assert "keys[0].sha256" in str(caught.value)
    assert key not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_content_is_taken_or_refused(content: bytes) -> None:
    with suppress(KeyFileError):
        keys.parse(content)
