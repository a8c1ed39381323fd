"""The fake's schedules and its detection of hazards: uses of the same memory that nothing orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engines.backends.cuda import Cuda, CudaDevice, CudaStream, DeviceBuffer
from tests.engines.backends.cuda.gpus import filled, values
from tests.engines.backends.fake_cuda import ByPriority, FakeCuda, Seeded, Threads

SCHEDULES: dict[str, Callable[[], Any]] = {"threads": Threads, "seeded": lambda: Seeded(1), "by priority": ByPriority}


@pytest.fixture(params=SCHEDULES)
def fake(request: pytest.FixtureRequest) -> FakeCuda:
    return FakeCuda(schedule=SCHEDULES[request.param]())


def streams(device: CudaDevice) -> tuple[CudaStream, CudaStream]:
    return device.stream("first"), device.stream("second")


def nothing(_first: CudaStream, _second: CudaStream) -> None:
    """Nothing orders them."""


def follow(first: CudaStream, second: CudaStream) -> None:
    second.follow(first.record())


def wait(first: CudaStream, _second: CudaStream) -> None:
    first.record().wait()


def look(first: CudaStream, _second: CudaStream) -> None:
    event = first.record()
    while not event.done():
        pass


def follow_too_early(first: CudaStream, second: CudaStream) -> None:
    second.follow(second.record())
    first.record()


@pytest.mark.parametrize(
    ("between", "ordered"), [(nothing, False), (follow, True), (wait, True), (look, True), (follow_too_early, False)]
)
def test_streams_that_use_the_same_memory_need_an_event_between_them(
    device: CudaDevice, fake: FakeCuda, between: Callable[[CudaStream, CudaStream], None], *, ordered: bool
) -> None:
    first, second = streams(device)
    buffer = device.allocate((4, 8), np.float32)
    first.write(buffer, values(8), at=1)
    between(first, second)
    second.read(buffer, at=1).result()
    first.record().wait()
    assert (not fake.faults) == ordered
    assert all("no event orders them" in fault for fault in fake.faults)


def other_entries(first: CudaStream, second: CudaStream, buffer: DeviceBuffer) -> None:
    first.write(buffer, values(8), at=1)
    second.write(buffer, values(8), at=2)


def readers(first: CudaStream, second: CudaStream, buffer: DeviceBuffer) -> None:
    first.read(buffer)
    second.read(buffer)


@pytest.mark.parametrize("use", [other_entries, readers])
def test_other_bytes_and_reading_are_no_hazard(
    device: CudaDevice, fake: FakeCuda, use: Callable[[CudaStream, CudaStream, DeviceBuffer], None]
) -> None:
    first, second = streams(device)
    use(first, second, device.allocate((4, 8), np.float32))
    first.record().wait()
    second.record().wait()
    assert not fake.faults


def test_a_hazard_is_found_behind_uses_that_are_ordered(device: CudaDevice, fake: FakeCuda) -> None:
    """Three writers, of which the second follows the first, and the third only the first."""
    (first, second), third = streams(device), device.stream("third")
    buffer = device.allocate((8,), np.float32)
    first.write(buffer, values(8))
    event = first.record()
    for stream in (second, third):
        stream.follow(event)
        stream.write(buffer, values(8))
    for stream in (second, third):
        stream.record().wait()
    assert len(fake.faults) == 1
    assert f"stream {second.handle:#x} writes" in fake.faults[0]
    assert f"stream {third.handle:#x} writes" in fake.faults[0]


def test_a_graph_uses_what_its_work_uses(device: CudaDevice, fake: FakeCuda) -> None:
    first, second = streams(device)
    source, to = filled(device, first, 8), device.allocate((8,), np.float32)
    graph = first.capture(lambda: first.copy(source, to), keep=(source, to))
    graph.launch()
    second.read(to).result()
    first.record().wait()
    assert len(fake.faults) == 1


def test_freed_memory_is_nobodys(device: CudaDevice, fake: FakeCuda) -> None:
    first, second = streams(device)
    for stream in (first, second):
        stream.write(device.allocate((8,), np.float32), values(8))
    assert not fake.faults


@pytest.mark.parametrize("seed", range(8))
def test_a_seed_always_gives_the_same_order_and_others_give_others(seed: int) -> None:
    assert order_of(seed) == order_of(seed)
    assert len({tuple(order_of(other)) for other in range(8)}) > 4


def order_of(seed: int) -> list[int]:
    """Which of two streams copied, in the order in which they did."""
    fake, order = FakeCuda(schedule=Seeded(seed)), list[int]()
    first, second = streams(CudaDevice(Cuda(fake), name="Fake"))
    for _ in range(5):
        for number, stream in enumerate((first, second)):
            fake._streams[stream.handle].give(lambda number=number: order.append(number))  # type: ignore[misc]
    first.record().wait()
    second.record().wait()
    return order


def test_late_work_is_not_done_before_the_host_waits() -> None:
    fake = FakeCuda(schedule=ByPriority())
    device = CudaDevice(Cuda(fake), name="Fake")
    stream, done = device.stream("work"), list[int]()
    fake._streams[stream.handle].give(lambda: done.append(1))
    event = stream.record()
    assert not done
    event.wait()
    assert done


def test_urgent_work_starves_the_rest() -> None:
    """What is decoded on a stream of lower priority waits for as long as steps are launched ahead."""
    fake, order = FakeCuda(schedule=ByPriority()), list[str]()
    device = CudaDevice(Cuda(fake), name="Fake")
    steps, decode = device.stream("steps", urgent=True), device.stream("decode")
    fake._streams[decode.handle].give(lambda: order.append("decode"))
    decoded, ahead = decode.record(), None
    for _ in range(5):
        fake._streams[steps.handle].give(lambda: order.append("step"))
        launched = steps.record()
        if ahead:
            ahead.wait()
        ahead = launched
    assert "decode" not in order
    decoded.wait()
    assert order == ["step"] * 5 + ["decode"]
