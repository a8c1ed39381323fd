"""Packed LoRAs in memory: how many are kept, and that each is packed once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from server.loras.packed import PackedLoras
from server.requests.errors import LoraUnreadable
from server.requests.params import Lora

EACH = 200  # bytes


def lora(name: str) -> Lora:
    values = np.zeros((1, EACH // 2), np.float16)
    return Lora(name, "0" * 64, values, updates_unet=True, updates_text_encoder=False)


def test_those_used_last_are_kept() -> None:
    packed = PackedLoras(2 * EACH)
    made: list[str] = []

    def make(name: str) -> Lora:
        made.append(name)
        return lora(name)

    def get(name: str) -> Lora:
        return packed.get(name, lambda: make(name))

    first = get("a")
    get("b")
    assert get("a") is first
    get("c")  # in place of b
    assert get("a") is first
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert packed.bytes == 2 * EACH


def test_one_that_is_larger_than_the_memory_is_not_kept() -> None:
    packed = PackedLoras(EACH - 1)
    assert packed.get("a", lambda: lora("a")).name == "a"
    assert packed.bytes == 0


def test_requests_hold_no_more_than_as_much_again() -> None:
    packed = PackedLoras(2 * EACH)
    held = [packed.get(name, lambda name=name: lora(name)) for name in "abcde"]  # type: ignore[misc]
    with pytest.raises(LoraUnreadable, match="hold all the memory for LoRAs"):
        packed.get("f", lambda: lora("f"))
    assert packed.get("e", lambda: lora("e")) is held[-1]  # which is kept
    del held
    assert packed.get("f", lambda: lora("f")).name == "f"


def test_of_many_that_want_it_one_packs() -> None:
    packed, begun, go_on, made = PackedLoras(EACH), threading.Event(), threading.Event(), []

    def slow() -> Lora:
        made.append(1)
        begun.set()
        assert go_on.wait(10)
        return lora("a")

    with ThreadPoolExecutor(32) as threads:
        futures = [threads.submit(packed.get, "a", slow) for _ in range(32)]
        assert begun.wait(10)
        assert packed.get("b", lambda: lora("b")).name == "b"  # others do not wait for it
        go_on.set()
        assert len({id(future.result(10)) for future in futures}) == 1
    assert len(made) == 1


def test_an_error_is_every_waiters_and_the_next_one_tries_again() -> None:
    packed, begun, go_on = PackedLoras(EACH), threading.Event(), threading.Event()

    def failing() -> Lora:
        begun.set()
        assert go_on.wait(10)
        raise ValueError("damaged")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(packed.get, "a", failing)
        assert begun.wait(10)
        second = threads.submit(packed.get, "a", lambda: lora("never"))
        go_on.set()
        with pytest.raises(ValueError, match="damaged"):
            first.result(10)
        try:
            assert second.result(10).name == "never"  # it came after the end of the first
        except ValueError as error:
            assert str(error) == "damaged"  # noqa: PT017 - it came before
    assert packed.get("a", lambda: lora("a")).name == "a" or packed.bytes
