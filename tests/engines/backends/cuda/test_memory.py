"""The GPU's memory: what uses it, when it is freed, and what is said when it is full."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from engines.backends.cuda import Cuda, CudaDevice
from engines.backends.device import ALIGNMENT
from engines.errors import DeviceLost, EngineError
from tests.engines.backends.cuda.gpus import MIB, filled, values
from tests.engines.backends.fake_cuda import GIB, FakeCuda


def test_memory_is_freed_with_its_last_reference_and_counted_until_then(device: CudaDevice, fake: FakeCuda) -> None:
    state = device.allocate((2, MIB), np.uint8, purpose="state")
    also = device.allocate((MIB,), np.uint8, purpose="state")
    device.allocate((5,), np.uint8)
    assert device.memory() == {"state": 3 * MIB}
    part = state.view((4,), np.uint8, offset=ALIGNMENT)
    del state, also
    assert device.memory() == {"state": 2 * MIB}
    assert fake.live() == [2 * MIB]
    del part
    assert device.memory() == {}
    assert fake.live() == []


def test_what_takes_most_comes_first(device: CudaDevice) -> None:
    kept = [device.allocate((size,), np.uint8, purpose=purpose) for purpose, size in (("a", 1), ("b", 3), ("a", 1))]
    assert list(device.memory().items()) == [("b", 3), ("a", 2)]
    assert len(kept) == 3


PURPOSES = [("state", 2 * MIB), ("denoise weights", 23 * MIB // 2), ("scratch", 20 * MIB)]


def test_full_memory_says_what_takes_how_much_and_what_to_do() -> None:
    device = CudaDevice(Cuda(FakeCuda(total=8 * GIB, others=8 * GIB - 40 * MIB)), name="Fake")
    kept = [device.allocate((size,), np.uint8, purpose=purpose) for purpose, size in PURPOSES]
    with pytest.raises(EngineError) as raised:
        device.allocate((4, GIB), np.uint8, purpose="latents")
    assert str(raised.value) == (
        "The GPU's memory is full: 4.0 GiB for latents could not be allocated. "
        "Of the GPU's 8.0 GiB this process uses scratch 20.0 MiB, denoise weights 11.5 MiB, state 2.0 MiB; "
        "CUDA itself and other programs use 8.0 GiB. "
        "Build with fewer --rows, a smaller --resolution or --decode-batch, or stop other programs that use the GPU."
    )
    assert not isinstance(raised.value, DeviceLost)
    kept.clear()
    assert device.allocate((30, MIB), np.uint8).nbytes == 30 * MIB


def test_what_other_threads_drop_is_freed_by_the_one_that_owns_the_device(device: CudaDevice, fake: FakeCuda) -> None:
    held = [device.allocate((4,), np.float32)]
    other = threading.Thread(target=held.clear)
    other.start()
    other.join()
    assert fake.live() == [16]
    assert device.memory() == {}
    device.stream("work").record()
    assert fake.live() == []


def opened(fake: FakeCuda, also: Callable[[list[Any]], None] = lambda _held: None) -> list[Any]:
    """What a thread that has ended opened and allocated; `also` is done with it before the end."""
    held: list[Any] = []

    def own() -> None:
        device = CudaDevice(Cuda(fake), name="Fake")
        stream = device.stream("work")
        buffer = filled(device, stream, 4)
        held.extend((device, stream.capture(partial(stream.copy, buffer, buffer), keep=(buffer,)), buffer))
        also(held)

    do_in_a_thread(own)
    return held


def do_in_a_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def test_when_the_owning_thread_has_ended_others_free_what_they_drop(fake: FakeCuda) -> None:
    held = opened(fake)
    assert (fake.live(), fake.graphs) == ([16], 1)
    do_in_a_thread(held.clear)
    assert (fake.live(), fake.live(pinned=True), fake.graphs) == ([], [], 0)
    assert (fake._streams, fake._events) == ({}, {})


def test_what_others_dropped_before_the_owning_thread_ended_is_freed_at_its_end(fake: FakeCuda) -> None:
    def drop_elsewhere(held: list[Any]) -> None:
        do_in_a_thread(held.clear)
        assert (fake.live(), fake.graphs) == ([16], 1)

    assert opened(fake, drop_elsewhere) == []
    assert (fake.live(), fake.live(pinned=True), fake.graphs) == ([], [], 0)


def test_nothing_is_freed_while_another_device_of_the_process_captures(device: CudaDevice, fake: FakeCuda) -> None:
    """Where it captures globally, as ONNX Runtime does, CUDA would refuse to free, and break the capture."""
    held, stream = opened(fake), device.stream("work")
    buffer = filled(device, stream, 7)

    def enqueue() -> None:
        do_in_a_thread(held.clear)
        assert (fake.live(), fake.graphs) == ([16, 28], 1)
        stream.copy(buffer, buffer)

    graph = stream.capture(enqueue, keep=())
    assert (fake.live(), fake.graphs) == ([28], 1)
    graph.launch()


def test_a_stream_gives_everything_back(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    kept = stream.read(buffer)
    del stream
    np.testing.assert_array_equal(kept.result(), values(4))
    del kept, buffer
    gc.collect()
    assert fake.live(pinned=True) == []
    assert len(fake._streams) == 1  # the one that zeroes memory
    assert fake._events == {}


def test_no_memory_of_the_gpu_is_asked_for_while_it_works(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    before = fake.calls["cudaMalloc"]
    for _ in range(5):
        stream.write(buffer, values(4))
        stream.read(buffer)
    assert fake.calls["cudaMalloc"] == before
