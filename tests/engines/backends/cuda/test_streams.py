"""Streams: order, events, and copies in flight."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from engines.backends.cuda import CudaDevice, CudaStream
from engines.backends.cuda.pinned import CudaReading
from engines.errors import EngineError
from tests.engines.backends.cuda.gpus import filled, read, values
from tests.engines.backends.fake_cuda import FakeCuda


def test_the_written_array_may_be_changed_and_the_read_one_kept(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer, array = any_device.allocate((2, 3), np.float32), values(2, 3)
    stream.write(buffer, array)
    array[:] = 7
    kept = stream.read(buffer)
    stream.write(buffer, array)
    np.testing.assert_array_equal(kept.result(), values(2, 3))
    kept.result()[:] = -1
    np.testing.assert_array_equal(kept.result(), values(2, 3))
    np.testing.assert_array_equal(read(stream, buffer), np.full((2, 3), 7))


def test_what_is_written_while_the_gpu_is_busy_is_not_overwritten(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = device.allocate((8, 4), np.float32)
    with fake.gate(stream.handle):
        for at in range(8):
            stream.write(buffer, np.full(4, at), at=at)
        reading = stream.read(buffer)
        marked = stream.record()
        assert not reading.done()
        assert not marked.done()
    np.testing.assert_array_equal(reading.result(), np.repeat(np.arange(8.0), 4).reshape(8, 4))
    assert reading.done()
    marked.wait()
    assert marked.done()


def test_pinned_memory_is_used_again_once_its_copy_is_done(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = device.allocate((4,), np.float32)
    for _ in range(10):
        stream.write(buffer, values(4))
        stream.record().wait()
    assert fake.live(pinned=True) == [4096]
    for _ in range(10):
        stream.read(buffer).result()
    assert fake.live(pinned=True) == [4096]


def test_a_pinned_block_that_goes_after_its_event_still_waits_for_it(device: CudaDevice, fake: FakeCuda) -> None:
    """As in a cycle of garbage, whose parts go in any order."""
    block = device.stream("test")._staging.take(64)
    del block.event
    gc.collect()
    del block
    gc.collect()
    assert fake.live(pinned=True) == []


def test_a_reading_keeps_its_pinned_memory_until_it_is_dropped(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    readings: list[CudaReading] = []
    for number in range(3):
        stream.write(buffer, np.full(4, number))
        readings.append(stream.read(buffer))
    stream.record().wait()
    assert [list(one.result()) for one in readings] == [[number] * 4 for number in range(3)]
    before = fake.calls["cudaHostAlloc"]
    readings.clear()
    stream.read(buffer).result()
    assert fake.calls["cudaHostAlloc"] == before


def test_readings_arrive_in_order(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = any_device.allocate((1000,), np.float32)
    readings = []
    for number in range(20):
        stream.write(buffer, np.full(1000, number))
        readings.append(stream.read(buffer))
    readings[-1].result()
    assert all(one.done() for one in readings)
    assert [one.result()[0] for one in readings] == list(range(20))


def test_a_stream_waits_for_an_event_of_another(device: CudaDevice, fake: FakeCuda) -> None:
    first, second = device.stream("first"), device.stream("second")
    buffer = device.allocate((4,), np.float32)
    with fake.gate(first.handle):
        first.write(buffer, values(4))
        second.follow(first.record())
        reading = second.read(buffer)
        assert not reading.done()
    np.testing.assert_array_equal(reading.result(), values(4))


def test_streams_go_on_without_each_other(device: CudaDevice, fake: FakeCuda) -> None:
    first, second = device.stream("first"), device.stream("second")
    buffer = filled(device, second, 4)
    with fake.gate(first.handle):
        mark = first.record()
        np.testing.assert_array_equal(read(second, buffer), values(4))
        assert not mark.done()
    mark.wait()
    assert mark.done()


def test_a_real_stream_follows_too(any_device: CudaDevice, stream: CudaStream) -> None:
    other = any_device.stream("other", urgent=True)
    buffer = filled(any_device, stream, 1000, 1000)
    other.follow(stream.record())
    np.testing.assert_array_equal(read(other, buffer), values(1000, 1000))


def test_timed_events_know_the_time_between_them(any_device: CudaDevice, stream: CudaStream) -> None:
    first = stream.record(timed=True)
    filled(any_device, stream, 100)
    last = stream.record(timed=True)
    last.wait()
    assert last.seconds_since(first) >= 0
    with pytest.raises(EngineError, match="recorded with timed=True"):
        stream.record().seconds_since(first)


def test_events_say_how_the_host_waits(device: CudaDevice, fake: FakeCuda) -> None:
    """Asleep, and with the time only where it is wanted."""
    stream = device.stream("work")
    plain, timed = stream.record(), stream.record(timed=True)
    blocking, untimed = fake.cudaEventBlockingSync, fake.cudaEventDisableTiming
    assert fake._events[int(plain.handle)].flags == blocking | untimed
    assert fake._events[int(timed.handle)].flags == blocking


def test_urgent_streams_have_the_greatest_priority(device: CudaDevice, fake: FakeCuda) -> None:
    ordinary, urgent = device.stream("pictures"), device.stream("steps", urgent=True)
    assert [fake.priority_of(one.handle) for one in (ordinary, urgent)] == [0, -5]
