"""What an engine computes, over a fake of TensorRT's runtime and of CUDA; on a GPU, over the real ones as well."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from engines.backends.device import ALIGNMENT, Buffer
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.tensorrt.tiny import WIDTH, Bench, inputs


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_an_engine_computes_what_onnx_runtime_does(any_bench: Bench, rows: int) -> None:
    given = inputs(rows)
    buffers, call = any_bench.bind(given)
    call.launch()
    np.testing.assert_array_equal(any_bench.read(buffers["y"]), any_bench.expected(given))


def test_each_launch_computes_from_new_contents(any_bench: Bench) -> None:
    """The first is plain, the second captured, the third a graph's."""
    buffers, call = any_bench.bind(inputs(2))
    for seed in range(5):
        given = inputs(2, seed=seed)
        any_bench.write(buffers, given)
        call.launch()
        np.testing.assert_array_equal(any_bench.read(buffers["y"]), any_bench.expected(given))


def test_launches_are_given_ahead(any_bench: Bench) -> None:
    """Nothing waits between them, and each sees what was written before it."""
    buffers, call = any_bench.bind(inputs(2))
    readings = []
    for seed in range(8):
        any_bench.write(buffers, inputs(2, seed=seed))
        call.launch()
        readings.append(any_bench.stream.read(buffers["y"]))
    for seed, reading in enumerate(readings):
        np.testing.assert_array_equal(reading.result(), any_bench.expected(inputs(2, seed=seed)))


def test_no_launch_waits_for_the_gpu(bench: Bench, gpu: FakeCuda) -> None:
    buffers, call = bench.bind(inputs(2))
    with gpu.gate(bench.stream.handle):
        for _ in range(3):
            call.launch()
        reading = bench.stream.read(buffers["y"])
        assert not reading.done()
    np.testing.assert_array_equal(reading.result(), bench.expected(inputs(2)))


def test_calls_of_one_engine_take_turns(any_bench: Bench) -> None:
    """They share its scratch; and what one computed may be what another reads."""
    engine, allocate = any_bench.device.load(any_bench.engine, any_bench.stream), any_bench.device.allocate
    given = inputs(2)
    first, second = allocate((2, WIDTH), np.float32), allocate((2, WIDTH), np.float32)
    shared: dict[str, Buffer] = {name: allocate(given[name].shape, given[name].dtype) for name in ("row", "table")}
    there = engine.bind({**shared, "x": first, "y": second})
    back = engine.bind({**shared, "x": second, "y": first})
    once = any_bench.expected(given)
    for _ in range(3):
        any_bench.write({**shared, "x": first}, given)
        there.launch()
        back.launch()
        np.testing.assert_array_equal(any_bench.read(second), once)
        np.testing.assert_array_equal(any_bench.read(first), any_bench.expected({**given, "x": once}))


def test_a_view_is_bound_like_a_buffer(any_bench: Bench) -> None:
    given = inputs(2)
    plan = any_bench.device.allocate((4 * ALIGNMENT,), np.uint8)
    buffers: dict[str, Buffer] = {
        name: plan.view(array.shape, array.dtype, offset=number * ALIGNMENT)
        for number, (name, array) in enumerate(given.items())
    }
    buffers["y"] = plan.view((2, WIDTH), np.float32, offset=3 * ALIGNMENT)
    any_bench.write(buffers, given)
    call = any_bench.device.load(any_bench.engine, any_bench.stream).bind(buffers)
    for _ in range(3):
        call.launch()
    np.testing.assert_array_equal(any_bench.read(buffers["y"]), any_bench.expected(given))


def test_a_call_outlives_its_engine_and_buffers(bench: Bench) -> None:
    given = inputs(2)
    buffers, call = bench.bind(given)
    output = buffers.pop("y")
    buffers.clear()
    gc.collect()
    for _ in range(3):
        call.launch()
        np.testing.assert_array_equal(bench.read(output), bench.expected(given))


def test_memory_is_counted_by_purpose_and_freed_with_the_last_call(bench: Bench, gpu: FakeCuda) -> None:
    made = bench.bind(inputs(2))
    for _ in range(3):
        made[1].launch()
    bench.stream.record().wait()
    weights = bench.onnx.stat().st_size
    assert bench.device.memory() == {"scratch": 4096, "tiny weights": weights, "other": 32 + 16 + 96 + 32}
    assert gpu.graphs == 1
    del made
    assert bench.device.memory() == {"scratch": 4096}
    assert (gpu.graphs, gpu.live()) == (0, [4096])


@pytest.mark.parametrize(("rows", "profile"), [(1, 0), (2, 0), (3, 1), (4, 1)])
def test_the_first_profile_that_takes_the_shapes_is_chosen(
    bench: Bench, rows: int, profile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    real = fake.IExecutionContext.set_optimization_profile_async

    def spy(context: fake.IExecutionContext, index: int, stream: int) -> bool:
        chosen.append(index)
        return real(context, index, stream)

    monkeypatch.setattr(fake.IExecutionContext, "set_optimization_profile_async", spy)
    bench.bind(inputs(rows))
    assert chosen == [profile]
