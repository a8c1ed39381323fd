"""The host's memory under the protocols that a GPU's is under: what is asked for is done at once."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from engines.backends.device import ALIGNMENT, Buffer, Event
from engines.backends.host import GraphPort, HostBuffer, HostDevice, HostStream, bound_arrays
from engines.errors import EngineError


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def stream(device: HostDevice) -> HostStream:
    return device.stream("tests")


def filled(device: HostDevice, *shape: int) -> HostBuffer:
    buffer = device.allocate(shape, np.float32)
    buffer.array[...] = np.arange(buffer.array.size).reshape(shape)
    return buffer


def test_memory_begins_as_zeros(device: HostDevice, stream: HostStream) -> None:
    made = stream.read(device.allocate((2, 3), np.int64)).result()
    assert made.dtype == np.int64
    np.testing.assert_array_equal(made, np.zeros((2, 3)))


def test_what_was_written_may_change_and_what_was_read_is_the_readers(device: HostDevice, stream: HostStream) -> None:
    buffer, values = device.allocate((2,), np.float32), np.array([1, 2], np.float32)
    stream.write(buffer, values)
    values[:] = 0
    reading = stream.read(buffer)
    stream.write(buffer, values)
    assert reading.done()
    reading.result()[0] = 5
    assert stream.read(buffer).result().tolist() == [0, 0]


def test_entries_are_written_copied_and_read(device: HostDevice, stream: HostStream) -> None:
    source, to = filled(device, 4, 2), device.allocate((3, 2), np.float32)
    stream.copy(source, to, source_at=3, at=0)
    stream.write(to, np.array([8, 9]), at=-1)
    assert stream.read(to).result().tolist() == [[6, 7], [0, 0], [8, 9]]
    assert stream.read(to, at=2).result().tolist() == [8, 9]
    one = device.allocate((1, 2), np.float32)
    stream.copy(to, one, source_at=0)
    assert stream.read(one).result().tolist() == [[6, 7]]


def test_entries_may_be_single_numbers(device: HostDevice, stream: HostStream) -> None:
    buffer = filled(device, 3)
    stream.write(buffer, np.array(7), at=1)
    stream.copy(buffer, buffer, source_at=1, at=0)
    assert stream.read(buffer).result().tolist() == [7, 7, 2]
    assert stream.read(buffer, at=2).result() == 2


def test_what_does_not_fit_is_refused(device: HostDevice, stream: HostStream) -> None:
    buffer = filled(device, 4, 2)
    with pytest.raises(ValueError, match="broadcast"):
        stream.write(buffer, np.zeros((3, 2)))
    with pytest.raises(IndexError):
        stream.write(buffer, np.zeros(2), at=4)
    with pytest.raises(EngineError, match="same dtype and size"):
        stream.copy(buffer, buffer, source_at=0)
    with pytest.raises(EngineError, match="same dtype and size"):
        stream.copy(buffer, device.allocate((4, 2), np.int32))


def test_a_view_is_the_same_memory(device: HostDevice, stream: HostStream) -> None:
    whole = device.allocate((2 * ALIGNMENT,), np.uint8)
    part = whole.view((2, 3), np.float32, offset=ALIGNMENT)
    stream.write(part, np.ones((2, 3)))
    read = stream.read(whole).result()
    np.testing.assert_array_equal(read[ALIGNMENT : ALIGNMENT + 24].view(np.float32), np.ones(6))
    assert read.sum() == read[ALIGNMENT : ALIGNMENT + 24].sum()
    assert part.view((), np.float32, offset=0).shape == ()


@pytest.mark.parametrize(("count", "offset"), [(ALIGNMENT + 1, ALIGNMENT), (1, 2 * ALIGNMENT), (1, -ALIGNMENT), (1, 8)])
def test_a_view_lies_inside_and_where_a_device_could_address_it(device: HostDevice, count: int, offset: int) -> None:
    with pytest.raises(ValueError, match="does not fit into 512 bytes"):
        device.allocate((2 * ALIGNMENT,), np.uint8).view((count,), np.uint8, offset=offset)


def test_memory_is_counted_by_purpose_until_its_last_view_is_garbage(device: HostDevice) -> None:
    pool = device.allocate((ALIGNMENT,), np.float32, purpose="pool")
    view = pool.view((8,), np.uint8, offset=ALIGNMENT).view((4,), np.uint8, offset=0)
    other = device.allocate((3,), np.uint8)
    assert device.memory() == {"pool": 4 * ALIGNMENT, "other": 3}
    del pool, other
    assert device.memory() == {"pool": 4 * ALIGNMENT}
    del view
    assert device.memory() == {}


def test_full_memory_is_an_error_that_says_what_takes_it(device: HostDevice) -> None:
    pool = device.allocate((2**20,), np.uint8, purpose="pool")
    with pytest.raises(
        EngineError, match=r"full: 1099511627776 MiB for step .* uses pool 1 MiB\. Build with fewer --rows"
    ):
        device.allocate((2**60,), np.uint8, purpose="step")
    assert device.memory() == {"pool": pool.array.nbytes}


def test_events_are_passed_when_they_are_recorded(device: HostDevice, stream: HostStream) -> None:
    first, second = stream.record(timed=True), stream.record(timed=True)
    device.stream("others", urgent=True).follow(first)
    first.wait()
    assert first.done()
    assert 0 <= second.seconds_since(first) < 1
    assert first.seconds_since(second) == -second.seconds_since(first)


def test_other_devices_things_are_refused(stream: HostStream) -> None:
    foreign = cast(Buffer, object())
    with pytest.raises(EngineError, match="works on host memory, was given object"):
        stream.read(foreign)
    with pytest.raises(EngineError, match="works on host memory, was given object"):
        bound_arrays({"x": foreign}, {"x": GraphPort("float32", ())}, "decode.onnx")
    with pytest.raises(EngineError, match="was given object"):
        stream.record().seconds_since(cast(Event, object()))


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        ({"x": GraphPort("float32", (None, 2)), "y": GraphPort("float32", ())}, "has the ports x, y; x are bound"),
        ({"x": GraphPort("float32", (None, 3))}, r"x is float32 \[\?, 3\]; float32 \[1, 2\] is bound"),
        ({"x": GraphPort("float32", (None,))}, r"x is float32 \[\?\]; float32 \[1, 2\] is bound"),
        ({"x": GraphPort("int64", (1, 2))}, r"x is int64 \[1, 2\]; float32"),
        ({"x": GraphPort("", (1, 2))}, "x is "),
    ],
)
def test_only_what_the_graph_takes_is_bound(device: HostDevice, ports: dict[str, GraphPort], words: str) -> None:
    buffers = {"x": device.allocate((1, 2), np.float32)}
    with pytest.raises(EngineError, match=f"^decode.onnx:? {words}"):
        bound_arrays(buffers, ports, "decode.onnx")
    assert bound_arrays(buffers, {"x": GraphPort("float32", (None, 2))}, "decode.onnx")["x"].shape == (1, 2)
