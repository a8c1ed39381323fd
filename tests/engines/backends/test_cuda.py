"""Streams, events and buffers on the GPU, over a fake of CUDA; where there is a GPU, over the real one as well."""

from __future__ import annotations

import ast
import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime

from engines.backends.cuda import (
    Cuda,
    CudaDevice,
    CudaStream,
    DeviceBuffer,
    Probe,
    as_cuda_stream,
    check,
    open_cuda,
    probe,
    status,
)
from engines.backends.cuda.pinned import CudaReading
from engines.backends.device import ALIGNMENT
from engines.backends.registry import install_command
from engines.contract import Array
from engines.errors import DeviceLost, EngineError
from tests.engines.backends.fake_cuda import GIB, FakeCuda

FOUND = probe()
ON_A_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)])
MIB = 2**20


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """A fake GPU that nothing may go wrong on."""
    made = FakeCuda()
    yield made
    assert made.faults == []


@pytest.fixture
def device(fake: FakeCuda) -> CudaDevice:
    return CudaDevice(Cuda(fake), name="Fake")


@pytest.fixture(params=["fake", ON_A_GPU])
def any_device(request: pytest.FixtureRequest) -> CudaDevice:
    if request.param == "gpu":
        return CudaDevice(open_cuda()[0], name="GPU")
    made: CudaDevice = request.getfixturevalue("device")
    return made


@pytest.fixture
def stream(any_device: CudaDevice) -> CudaStream:
    return any_device.stream("work")


def values(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def filled(device: CudaDevice, stream: CudaStream, *shape: int) -> DeviceBuffer:
    buffer = device.allocate(shape, np.float32)
    stream.write(buffer, values(*shape))
    return buffer


def read(stream: CudaStream, buffer: DeviceBuffer, *, at: int | None = None) -> Array:
    return stream.read(buffer, at=at).result()


class Elsewhere:
    """A buffer, an event and a stream of another device."""

    shape = (2,)


# Buffers


def test_a_buffer_is_zero_when_made(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = any_device.allocate((3, 5), np.int64)
    np.testing.assert_array_equal(read(stream, buffer), np.zeros((3, 5), np.int64))
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((3, 5), np.dtype(np.int64), 120)
    assert buffer.address % ALIGNMENT == 0


def test_what_was_written_is_read(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = filled(any_device, stream, 2, 3)
    np.testing.assert_array_equal(read(stream, buffer), values(2, 3))
    np.testing.assert_array_equal(read(stream, buffer, at=-1), values(2, 3)[-1])


@pytest.mark.parametrize(
    "given", [values(3, 2).T, values(2, 3).astype(np.float64), np.float32(4), values(1, 2, 3)], ids=str
)
def test_what_is_laid_out_otherwise_is_written_as_numpy_copies_it(
    any_device: CudaDevice, stream: CudaStream, given: Array
) -> None:
    buffer, expected = any_device.allocate((2, 3), np.float32), np.zeros((2, 3), np.float32)
    stream.write(buffer, np.asarray(given))
    np.copyto(expected, given)
    np.testing.assert_array_equal(read(stream, buffer), expected)


@pytest.mark.parametrize("at", [0, 1, 3, -1])
def test_one_entry_is_written(any_device: CudaDevice, stream: CudaStream, at: int) -> None:
    buffer = filled(any_device, stream, 4, 2, 3)
    stream.write(buffer, -values(2, 3), at=at)
    expected = values(4, 2, 3)
    expected[at] = -values(2, 3)
    np.testing.assert_array_equal(read(stream, buffer), expected)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_a_buffer_is_copied_into_an_entry(any_device: CudaDevice, stream: CudaStream, shape: tuple[int, ...]) -> None:
    buffer = filled(any_device, stream, 4, 2, 3)
    stream.copy(any_device.allocate(shape, np.float32), buffer, at=2)
    expected = values(4, 2, 3)
    expected[2] = 0
    np.testing.assert_array_equal(read(stream, buffer), expected)


def test_an_entry_is_copied_into_another_and_a_whole_into_a_whole(any_device: CudaDevice, stream: CudaStream) -> None:
    source, to = filled(any_device, stream, 4, 2), any_device.allocate((3, 2), np.float32)
    stream.copy(source, to, source_at=3, at=1)
    np.testing.assert_array_equal(read(stream, to), [[0, 0], [6, 7], [0, 0]])
    whole = any_device.allocate((2, 4), np.float32)
    stream.copy(source, whole)
    np.testing.assert_array_equal(read(stream, whole), values(2, 4))


def test_a_view_is_part_of_the_same_memory(any_device: CudaDevice, stream: CudaStream) -> None:
    whole = any_device.allocate((3 * ALIGNMENT,), np.uint8)
    part = whole.view((2, 4), np.int64, offset=2 * ALIGNMENT)
    first = whole.view((ALIGNMENT,), np.int8, offset=ALIGNMENT).view((4,), np.int8, offset=0)
    stream.write(part, values(2, 4).astype(np.int64))
    stream.write(first, np.full(4, -1, np.int8))
    everything = read(stream, whole)
    np.testing.assert_array_equal(everything[2 * ALIGNMENT :][:64].view(np.int64), range(8))
    assert list(everything[ALIGNMENT - 1 :][:6]) == [0, 255, 255, 255, 255, 0]
    del whole
    np.testing.assert_array_equal(read(stream, part, at=1), [4, 5, 6, 7])


@pytest.mark.parametrize(("shape", "offset"), [((1,), 8), ((1,), -ALIGNMENT), ((65,), 0), ((1,), ALIGNMENT)])
def test_a_view_that_is_not_inside_is_refused(any_device: CudaDevice, shape: tuple[int, ...], offset: int) -> None:
    with pytest.raises(ValueError, match=rf"bytes at offset {offset} does not fit into 256 bytes at a multiple of 256"):
        any_device.allocate((64,), np.float32).view(shape, np.float32, offset=offset)


# What is refused


@pytest.mark.parametrize("at", [4, -5])
def test_an_entry_beyond_the_end_overwrites_nothing(any_device: CudaDevice, stream: CudaStream, at: int) -> None:
    buffer, row = filled(any_device, stream, 4, 2), any_device.allocate((2,), np.float32)
    with pytest.raises(IndexError):
        stream.write(buffer, values(2), at=at)
    with pytest.raises(IndexError):
        stream.copy(row, buffer, at=at)
    with pytest.raises(IndexError):
        stream.copy(buffer, row, source_at=at)
    with pytest.raises(IndexError):
        stream.read(buffer, at=at)
    np.testing.assert_array_equal(read(stream, buffer), values(4, 2))


def test_values_of_another_shape_are_refused(any_device: CudaDevice, stream: CudaStream) -> None:
    buffer = filled(any_device, stream, 2, 3)
    with pytest.raises(ValueError, match="broadcast"):
        stream.write(buffer, values(3, 2))
    np.testing.assert_array_equal(read(stream, buffer), values(2, 3))


@pytest.mark.parametrize(("shape", "dtype"), [((3,), np.float32), ((2,), np.int64), ((1,), np.int64)])
def test_a_source_that_is_no_entry_is_refused(
    any_device: CudaDevice, stream: CudaStream, shape: tuple[int, ...], dtype: type
) -> None:
    with pytest.raises(EngineError, match=r"A copy goes to float32 \(2,\), was given"):
        stream.copy(any_device.allocate(shape, dtype), filled(any_device, stream, 4, 2), at=0)


def test_what_is_of_another_device_is_refused(any_device: CudaDevice, stream: CudaStream) -> None:
    foreign, own = Elsewhere(), any_device.allocate((2,), np.float32)
    for given in (
        lambda: stream.copy(foreign, own),  # type: ignore[arg-type]
        lambda: stream.copy(own, foreign),  # type: ignore[arg-type]
        lambda: stream.write(foreign, values(2)),  # type: ignore[arg-type]
        lambda: stream.read(foreign),  # type: ignore[arg-type]
        lambda: stream.follow(foreign),  # type: ignore[arg-type]
        lambda: stream.record().seconds_since(foreign),  # type: ignore[arg-type]
        lambda: as_cuda_stream(foreign),
    ):
        with pytest.raises(EngineError, match="was given Elsewhere"):
            given()


# Order


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


def test_a_stream_follows_another_ones_event(device: CudaDevice, fake: FakeCuda) -> None:
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


# Memory


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


# Graphs


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


# A device that is lost


def test_a_lost_device_is_told_wherever_somebody_waits(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = filled(device, stream, 4)
    event, reading = stream.record(), stream.read(buffer)
    fake.lose("cudaErrorIllegalAddress")
    for waiting in (event.wait, event.done, reading.result, reading.done, stream.record, stream.check_alive):
        with pytest.raises(DeviceLost, match="CUDA error 700, an illegal memory access was encountered"):
            waiting()
    with pytest.raises(DeviceLost):
        stream.write(buffer, values(4))
    with pytest.raises(DeviceLost):
        device.allocate((4,), np.float32)


def test_an_ordinary_error_loses_nothing(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    buffer = device.allocate((4,), np.float32)
    fake.fail("cudaMemcpyAsync", "cudaErrorInvalidValue")
    with pytest.raises(EngineError, match="CUDA error 1, invalid argument") as raised:
        stream.write(buffer, values(4))
    assert not isinstance(raised.value, DeviceLost)
    stream.write(buffer, values(4))
    np.testing.assert_array_equal(read(stream, buffer), values(4))


def test_every_status_that_cuda_calls_final_is_one() -> None:
    """Its own reference, as far as it says so: inconsistent, or to be relaunched."""
    final = ("inconsistent state", "must be terminated and relaunched")
    documented = {one.name for one in runtime.cudaError_t if any(text in (one.__doc__ or "") for text in final)}
    assert "cudaErrorIllegalAddress" in documented
    assert documented <= status.LOST
    assert {one.name for one in runtime.cudaError_t} >= status.LOST


def test_check_hands_on_what_came_with_success() -> None:
    success = runtime.cudaError_t.cudaSuccess
    assert (check((success,)), check((success, 5)), check((success, 5, 6))) == ((), 5, (5, 6))


def test_full_memory_elsewhere_says_what_to_do() -> None:
    with pytest.raises(EngineError, match=r"CUDA error 2, out of memory.* fewer --rows"):
        check((runtime.cudaError_t.cudaErrorMemoryAllocation,))


# Which GPU there is


@pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
def test_without_a_gpu_the_probe_says_why() -> None:
    assert FOUND.gpu is None
    assert "CUDA error" in FOUND.reason
    with pytest.raises(EngineError, match=r"No GPU was found\. CUDA error"):
        open_cuda()


@pytest.mark.gpu
@pytest.mark.skipif(FOUND.gpu is None, reason=FOUND.reason)
def test_with_a_gpu_the_probe_names_it() -> None:
    assert FOUND.gpu is not None
    assert FOUND.gpu.name
    assert not FOUND.reason


def test_the_probe_names_the_gpu_and_what_it_can(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    for name in ("cudaGetDeviceCount", "cudaGetDeviceProperties"):
        monkeypatch.setattr(runtime, name, getattr(fake, name))
    found = probe().gpu
    assert found is not None
    assert (found.name, found.compute_capability) == ("Fake GPU", "8.9")


def test_without_cuda_python_the_probe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "runtime", None)
    assert probe() == Probe(None, f"cuda-python is not installed: {install_command('cuda')}")


def test_whatever_is_raised_becomes_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: 1 / 0)
    assert probe() == Probe(None, "division by zero")


# The fake, held against the real module

SOURCE = "\n".join(path.read_text() for path in sorted(Path(status.__file__).parent.glob("*.py")))


def uses(source: str) -> set[tuple[str, int]]:
    """The names of CUDA in `source`, with how many arguments each is given; -1 where it is not called."""
    tree = ast.parse(source)
    called = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    handed = {  # partial(calls.cudaFree, address) is called later
        id(node.args[0]): len(node.args) - 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "partial"
    }
    return {
        (node.attr, called.get(id(node), handed.get(id(node), -1)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and node.attr != "cuda"
    }


def parameters(function: object) -> list[str]:
    assert callable(function)
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(("name", "arguments"), sorted(uses(SOURCE)))
def test_what_is_called_of_cuda_is_there_and_takes_so_many(name: str, arguments: int) -> None:
    for owner in (runtime, runtime.cudaMemcpyKind, runtime.cudaStreamCaptureMode):
        if hasattr(owner, name):
            assert arguments == -1 or len(parameters(getattr(owner, name))) == arguments
            return
    pytest.fail(f"CUDA has no {name}")


def test_much_is_called_of_cuda() -> None:
    found = uses(SOURCE)
    assert {("cudaMemcpyAsync", 5), ("cudaFree", 1), ("cudaEventBlockingSync", -1)} <= found


@pytest.mark.parametrize("name", [name for name in vars(FakeCuda) if name.startswith("cuda")])
def test_the_fake_has_only_what_cuda_has(name: str) -> None:
    faked, real = getattr(FakeCuda, name), getattr(runtime, name)
    if inspect.isfunction(faked):
        assert parameters(faked) == parameters(real)
    else:
        assert faked == real


def test_the_fake_notices_memory_that_is_not_there(fake: FakeCuda) -> None:
    handle = Cuda(fake)._zeroing.handle
    pinned = fake.cudaHostAlloc(64, 0)[1]
    memory = fake.cudaMalloc(64)[1]
    pageable = np.zeros(64, np.uint8)
    to_gpu = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert fake.cudaMemcpyAsync(memory, pinned, 64, to_gpu, handle) == (runtime.cudaError_t.cudaSuccess,)
    for to, source, size in ((memory, pinned, 65), (memory, pageable.ctypes.data, 64), (pinned, pinned, 64)):
        other = FakeCuda()
        other.blocks, other._streams = fake.blocks, fake._streams
        assert other.cudaMemcpyAsync(to, source, size, to_gpu, handle) == (runtime.cudaError_t.cudaErrorInvalidValue,)
        assert "are not in allocated" in other.faults[0]
        assert other.cudaStreamQuery(handle) == (runtime.cudaError_t.cudaErrorIllegalAddress,)


def test_the_fake_notices_memory_that_is_freed_too_early() -> None:
    fake = FakeCuda()
    stream = CudaDevice(Cuda(fake), name="Fake").stream("work")
    memory = fake.cudaMalloc(64)[1]
    with fake.gate(stream.handle):
        assert fake.cudaMemsetAsync(memory, 1, 64, stream.handle) == (runtime.cudaError_t.cudaSuccess,)
        fake.give_back(memory)
        mark = stream.record()
    with pytest.raises(DeviceLost):
        mark.wait()
    assert "64 bytes at" in fake.faults[0]


def test_the_fake_refuses_in_a_capture_what_cuda_refuses(device: CudaDevice, fake: FakeCuda) -> None:
    stream = device.stream("work")
    mode = runtime.cudaStreamCaptureMode
    success, begin, end = runtime.cudaError_t.cudaSuccess, fake.cudaStreamBeginCapture, fake.cudaStreamEndCapture
    event = stream.record()
    event.wait()
    refusals: tuple[Callable[[], Any], ...] = (
        lambda: fake.cudaStreamSynchronize(stream.handle),
        lambda: fake.cudaStreamQuery(stream.handle),
        lambda: fake.cudaMalloc(4),
        lambda: fake.cudaFree(0),
        lambda: fake.cudaEventQuery(event.handle),
    )
    for refused in refusals:
        assert begin(stream.handle, mode.cudaStreamCaptureModeThreadLocal) == (success,)
        assert refused()[0] == runtime.cudaError_t.cudaErrorStreamCaptureUnsupported
        assert end(stream.handle)[0] == runtime.cudaError_t.cudaErrorStreamCaptureInvalidated
