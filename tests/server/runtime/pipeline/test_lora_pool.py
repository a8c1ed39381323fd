"""LoRAs on the device: written once, in parts, shared while used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from engines.backends.device import Buffer
from engines.backends.host import HostEvent, HostStream
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.contract import Array
from engines.errors import EngineError
from engines.manifest import Manifest
from server.requests.params import Lora
from server.runtime.pipeline import lora_pool
from server.runtime.pipeline.lora_pool import ZERO_RANK, LoraPool, LoraWatch, PlacedLora, Ranks

RANKS = 12  # of the pool, besides the zero


class Slow(HostStream):
    """Counts what it writes, is as late as a test says, and fails when told to."""

    def __init__(self) -> None:
        super().__init__(urgent=False)
        self.writes = 0
        self.fails_at = 0
        self.late = False

    def write(self, buffer: Buffer, values: Array, *, at: int | None = None) -> None:
        self.writes += 1
        if self.writes == self.fails_at:
            raise EngineError("a bad cable")
        super().write(buffer, values, at=at)

    def record(self, *, timed: bool = False) -> HostEvent:  # noqa: ARG002 - as the protocol
        return _Late(self)


class _Late(HostEvent):
    def __init__(self, stream: Slow) -> None:
        super().__init__()
        self._stream = stream

    def done(self) -> bool:
        return not self._stream.late


@pytest.fixture
def stream() -> Slow:
    return Slow()


@pytest.fixture
def found() -> list[bool]:
    return []


@pytest.fixture
def resident() -> list[frozenset[str]]:
    """What the pool told, in this order."""
    return []


@pytest.fixture
def pool(
    manifest: Manifest,
    stream: Slow,
    found: list[bool],
    resident: list[frozenset[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[LoraPool]:
    """It takes 12 ranks of 8 values, and writes two in a call."""
    device = OnnxRuntimeDevice(threads=1)
    device.pads = True
    monkeypatch.setattr(lora_pool, "_BYTES_PER_CALL", 2 * 8 * 2)
    with _dims(Q=RANKS + 1, G=8):
        yield LoraPool(
            manifest, device, stream=stream, watch=LoraWatch(found.append, lambda _ranks: None, resident.append)
        )


@contextmanager
def _dims(**sizes: int) -> Iterator[None]:
    real = Manifest.dims
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "dims", lambda manifest, size: {**real(manifest, size), **sizes})
        yield


def lora(name: str, ranks: int) -> Lora:
    values = np.arange(ranks * 8).reshape(ranks, 8) + ord(name)
    return Lora(name, name, values.astype(np.float16), updates_unet=True, updates_text_encoder=True)


def load(pool: LoraPool, one: Lora) -> tuple[int, ...]:
    rows = pool.acquire(one)
    while not pool.upload([one]):
        pass
    return rows


def held(pool: LoraPool, rows: tuple[int, ...], stream: Slow) -> Array:
    return stream.read(pool.buffer).result()[list(rows)]


def test_a_lora_is_written_in_parts_and_once(pool: LoraPool, stream: Slow, found: list[bool]) -> None:
    one = lora("a", 5)
    rows = pool.acquire(one)
    assert [pool.upload([one]) for _ in range(3)] == [False, False, True]
    np.testing.assert_array_equal(held(pool, rows, stream), one.values)
    assert pool.acquire(lora("a", 5)) == rows
    assert pool.upload([one])
    assert stream.writes == 5
    assert found == [False, True]
    assert pool.used == 5


def test_nothing_is_written_before_the_last_part_has_arrived(pool: LoraPool, stream: Slow) -> None:
    one = lora("a", 5)
    pool.acquire(one)
    stream.late = True
    assert [pool.upload([one]) for _ in range(3)] == [False] * 3
    assert stream.writes == 2
    stream.late = False
    assert [pool.upload([one]) for _ in range(2)] == [False, True]


def test_who_wants_a_lora_that_is_uploaded_for_another_waits_for_that(pool: LoraPool, stream: Slow) -> None:
    one = lora("a", 4)
    rows = pool.acquire(one)
    pool.upload([one])
    assert pool.acquire(one) == rows
    pool.release(one)
    assert pool.upload([one]), "the second goes on where the first was cancelled"
    assert stream.writes == 4
    np.testing.assert_array_equal(held(pool, rows, stream), one.values)


def test_a_lora_that_is_cancelled_half_way_is_not_taken_for_complete(pool: LoraPool, stream: Slow) -> None:
    one = lora("a", 4)
    pool.acquire(one)
    pool.upload([one])
    pool.release(one)
    assert pool.used == 0
    rows = load(pool, one)
    assert stream.writes == 2 + 4
    np.testing.assert_array_equal(held(pool, rows, stream), one.values)


def test_after_a_failed_part_another_request_goes_on(pool: LoraPool, stream: Slow) -> None:
    one = lora("a", 4)
    rows = pool.acquire(one)
    pool.acquire(one)
    stream.fails_at = 2
    with pytest.raises(EngineError):
        pool.upload([one])
    pool.release(one)
    while not pool.upload([one]):
        pass
    np.testing.assert_array_equal(held(pool, rows, stream), one.values)
    assert stream.writes == 5


def test_two_loras_of_a_request_share_a_call(pool: LoraPool, stream: Slow) -> None:
    both = [lora("a", 1), lora("b", 3)]
    rows = [pool.acquire(one) for one in both]
    assert [pool.upload(both) for _ in range(2)] == [False, True]
    for one, where in zip(both, rows, strict=True):
        np.testing.assert_array_equal(held(pool, where, stream), one.values)


def test_those_in_use_stay_while_others_make_room(pool: LoraPool, stream: Slow) -> None:
    kept = lora("k", 5)
    rows = load(pool, kept)
    for name in "abcdef":
        other = lora(name, 4)
        where = load(pool, other)
        np.testing.assert_array_equal(held(pool, where, stream), other.values)
        pool.release(other)
    np.testing.assert_array_equal(held(pool, rows, stream), kept.values)
    pool.release(kept)
    assert pool.used == 0
    assert not stream.read(pool.buffer, at=ZERO_RANK).result().any()


def test_it_tells_which_are_there_completely(pool: LoraPool, stream: Slow, resident: list[frozenset[str]]) -> None:
    one, other = lora("a", 5), lora("b", 5)
    load(pool, one)
    assert resident == [frozenset(), {"a"}]
    pool.acquire(other)
    pool.upload([other])
    pool.release(other)  # half way
    pool.release(one)
    assert resident[-1] == {"a"}
    load(pool, lora("c", 12))
    assert resident[-2:] == [frozenset(), {"c"}], "what made room is gone"
    assert stream.writes == 5 + 2 + 12


def test_what_no_lora_updates_reads_the_zero_rank() -> None:
    placed = [PlacedLora(lora("a", 2), 0.5, (7, 3)), PlacedLora(lora("b", 1), -1.0, (4,))]
    rows, weights = Ranks.of(placed).padded(5)
    assert rows.tolist() == [7, 3, 4, 0, 0]
    assert weights.tolist() == [0.5, 0.5, -1.0, 0, 0]
