"""CUDA graphs: capturing and launching."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from engines.backends.cuda import CudaDevice, CudaStream
from engines.errors import DeviceLost, EngineError
from tests.engines.backends.cuda.gpus import filled, read, values
from tests.engines.backends.fake_cuda import FakeCuda


def test_a_graph_does_again_what_was_captured(any_device: CudaDevice, stream: CudaStream) -> None:
    source, to = filled(any_device, stream, 4), any_device.allocate((4,), np.float32)
    graph = stream.capture(lambda: stream.copy(source, to), keep=(source, to))
    np.testing.assert_array_equal(read(stream, to), np.zeros(4))
    for number in range(3):
        stream.write(source, np.full(4, number))
        graph.launch()
        np.testing.assert_array_equal(read(stream, to), np.full(4, number))


def test_a_graph_keeps_what_it_points_to(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    source, to = filled(device, stream, 4), device.allocate((4,), np.float32)
    graph = stream.capture(partial(stream.copy, source, to), keep=(source,))
    del source
    graph.launch()
    np.testing.assert_array_equal(read(stream, to), values(4))
    assert fake.graphs == 1
    del graph
    assert fake.graphs == 0
    assert fake.live() == [16]


def test_memory_that_is_dropped_in_a_capture_is_freed_after_it(device: CudaDevice, fake: FakeCuda) -> None:
    """Python collects garbage when it likes, and CUDA breaks a capture in which memory is freed."""
    stream = device.stream("work")
    source, to = filled(device, stream, 4), device.allocate((4,), np.float32)
    held = [device.allocate((7,), np.float32)]

    def give() -> None:
        held.clear()
        stream.copy(source, to)
        assert 28 in fake.live()

    stream.capture(give, keep=()).launch()
    assert 28 not in fake.live()
    np.testing.assert_array_equal(read(stream, to), values(4))


def test_what_cannot_be_captured_leaves_the_stream_as_it_was(any_device: CudaDevice, stream: CudaStream) -> None:

    def give() -> None:
        any_device.allocate((4,), np.float32)

    with pytest.raises(EngineError, match="capturing") as raised:
        stream.capture(give, keep=())
    assert not isinstance(raised.value, DeviceLost)
    buffer = filled(any_device, stream, 4)
    np.testing.assert_array_equal(read(stream, buffer), values(4))


def test_a_capture_that_ends_badly_is_an_error(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    fake.fail("cudaGraphInstantiate", "cudaErrorMemoryAllocation")
    with pytest.raises(EngineError, match="out of memory"):
        stream.capture(lambda: stream.copy(buffer, buffer), keep=())
    assert fake.graphs == 0

    def raise_something() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stream.capture(raise_something, keep=())
    np.testing.assert_array_equal(read(stream, buffer), values(4))


def test_a_library_that_forks_inside_a_capture_is_captured_whole(device: CudaDevice, fake: FakeCuda) -> None:
    stream, aside = device.stream("work"), device.stream("aside")
    source, to = filled(device, stream, 4), device.allocate((4,), np.float32)

    def give() -> None:
        aside.follow(stream.record())
        aside.copy(source, to)
        stream.follow(aside.record())

    graph = stream.capture(give, keep=())
    stream.write(source, np.full(4, 9))
    graph.launch()
    np.testing.assert_array_equal(read(stream, to), np.full(4, 9))

    def give_and_leave() -> None:
        aside.follow(stream.record())
        aside.copy(source, to)

    with pytest.raises(EngineError, match="unjoined"):
        stream.capture(give_and_leave, keep=())
    assert fake.graphs == 1
