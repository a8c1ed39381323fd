"""TensorRT's engines over a fake of its runtime and of CUDA; where there is a GPU, over the real ones as well."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx

from engines.backends import tensorrt
from engines.backends import tensorrt_rtx as rtx
from engines.backends.cuda import Cuda, CudaStream, DeviceBuffer, Probe, probe
from engines.backends.device import ALIGNMENT, Buffer
from engines.backends.registry import install_command
from engines.backends.tensorrt import TensorRtCall, TensorRtDevice, open_package
from engines.backends.tensorrt_compatibility import check_fits, supported_capabilities
from engines.backends.tensorrt_log import logger_for
from engines.build.profiles import shapes
from engines.contract import Array, GraphName
from engines.errors import DeviceLost, EngineError
from engines.manifest import Build, Gpu, Manifest
from tests import ROOT
from tests.engines.backends import fake_tensorrt as fake
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import FAKE_GPU, Profile, fake_device, write_bundle_engine, write_engine

FOUND = probe()
NO_GPU = pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
DEMO = ROOT / "engines" / "demo"

# Two inputs that take their rows together, and one that is as long as it likes.
WIDTH = 4
PROFILES: list[Profile] = [
    {name: ((1, *rest), (rows, *rest), (rows, *rest)) for name, rest in (("x", (WIDTH,)), ("row", ()))}
    | {"table": ((1, WIDTH), (8, WIDTH), (8, WIDTH))}
    for rows in (2, 4)
]


def write_onnx(path: Path) -> Path:
    """y = relu(x @ w + table[row]), with small whole numbers, which every precision computes alike."""
    weights = np.eye(WIDTH, dtype=np.float32)[::-1] * 2
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["product"]),
        onnx.helper.make_node("Gather", ["table", "row"], ["gathered"]),
        onnx.helper.make_node("Add", ["product", "gathered"], ["sum"]),
        onnx.helper.make_node("Relu", ["sum"], ["y"]),
    ]
    value, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs = [
        value("x", real, ["N", WIDTH]),
        value("row", onnx.TensorProto.INT64, ["N"]),
        value("table", real, ["T", WIDTH]),
    ]
    outputs = [value("y", real, ["N", WIDTH])]
    graph = onnx.helper.make_graph(nodes, "tiny", inputs, outputs, [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def inputs(rows: int, *, seed: int = 0) -> dict[str, Array]:
    dice = np.random.default_rng(seed)
    return {
        "x": dice.integers(-8, 8, (rows, WIDTH)).astype(np.float32),
        "row": dice.integers(0, 6, rows),
        "table": dice.integers(-8, 8, (6, WIDTH)).astype(np.float32),
    }


def compile_with(package: str, source: Path, out: Path) -> None:
    """Build `source` for `PROFILES`. In a process of its own: a failed build may spoil the next one."""
    trt = import_module(package)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(source))
    config = builder.create_builder_config()
    for ranges in PROFILES:
        profile = builder.create_optimization_profile()
        for name, least_best_largest in ranges.items():
            profile.set_shape(name, *least_best_largest)
        assert config.add_optimization_profile(profile) >= 0
    content = builder.build_serialized_network(network, config)
    assert content is not None, f"{package} built nothing"
    out.write_bytes(content)


def compile_apart(package: str, source: Path, out: Path) -> Path:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        apart.submit(compile_with, package, source, out).result()
    return out


@dataclass(frozen=True)
class Bench:
    """A device, a stream of it, an engine of the tiny graph, and what ONNX Runtime makes of that."""

    device: TensorRtDevice
    stream: CudaStream
    engine: Path
    onnx: Path

    def bind(self, given: dict[str, Array]) -> tuple[dict[str, Buffer], TensorRtCall]:
        buffers: dict[str, Buffer] = {
            name: self.device.allocate(array.shape, array.dtype) for name, array in given.items()
        }
        self.write(buffers, given)
        buffers["y"] = self.device.allocate(given["x"].shape, np.float32)
        return buffers, self.device.load(self.engine, self.stream).bind(buffers)

    def write(self, buffers: dict[str, Buffer], given: dict[str, Array]) -> None:
        for name, array in given.items():
            self.stream.write(buffers[name], array)

    def read(self, buffer: Buffer) -> Array:
        return self.stream.read(buffer).result()

    def expected(self, given: dict[str, Array]) -> Array:
        result: Array = ort.InferenceSession(self.onnx).run(["y"], given)[0]
        return result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("tiny") / "tiny.onnx")


@pytest.fixture(scope="module")
def rtx_engine(tiny: Path) -> Path:
    """A real engine of TensorRT for RTX, which builds without a GPU."""
    return compile_apart("tensorrt_rtx", tiny, tiny.with_name("tiny.rtx"))


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A fake GPU that nothing may go wrong on."""
    made = FakeCuda()
    yield made
    assert made.faults == []


@pytest.fixture
def engine(tiny: Path, tmp_path: Path) -> Path:
    return write_engine(tmp_path / "tiny.engine", tiny, PROFILES)


@pytest.fixture
def bench(tiny: Path, engine: Path, gpu: FakeCuda) -> Bench:
    """The fake's."""
    device = fake_device(gpu)
    return Bench(device, device.stream("steps"), engine, tiny)


@pytest.fixture
def rtx_bench(tiny: Path, engine: Path, gpu: FakeCuda) -> Bench:
    """The fake's of TensorRT for RTX."""
    device = fake_device(gpu, for_rtx=True)
    return Bench(device, device.stream("steps"), engine, tiny)


def why_not(package: str) -> str:
    """Why `package` cannot run here; empty where it can."""
    if FOUND.gpu is None or find_spec(package) is None:
        return FOUND.reason or f"{package} is not installed"
    accepted = supported_capabilities(package)
    unfit = accepted and FOUND.gpu.compute_capability not in accepted
    return f"{package} does not run on {FOUND.gpu.compute_capability}" if unfit else ""


def on_a_gpu(package: str) -> Any:
    reason = why_not(package)
    return pytest.param(package, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)])


@pytest.fixture(params=["fake", "fake rtx", on_a_gpu("tensorrt_rtx"), on_a_gpu("tensorrt")])
def any_bench(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Bench:
    """The fakes', and on a GPU the real ones'."""
    if request.param.startswith("fake"):
        made: Bench = request.getfixturevalue("bench" if request.param == "fake" else "rtx_bench")
        return made
    device = (rtx if request.param == "tensorrt_rtx" else tensorrt).open_device(threads=0)
    return Bench(device, device.stream("steps"), compile_apart(request.param, tiny, tmp_path / "tiny.engine"), tiny)


# What an engine computes


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


# How it is launched


def launches(gpu: FakeCuda, call: TensorRtCall, times: int) -> list[tuple[int, int]]:
    """How many captures were begun, and how many graphs launched, after each launch."""
    counts = []
    for _ in range(times):
        call.launch()
        counts.append((gpu.calls["cudaStreamBeginCapture"], gpu.calls["cudaGraphLaunch"]))
    return counts


@pytest.mark.parametrize("for_rtx", [False, True])
def test_the_second_launch_is_captured_and_all_later_ones_are_its_graph(
    bench: Bench, rtx_bench: Bench, gpu: FakeCuda, for_rtx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueued = []
    real = fake.IExecutionContext.execute_async_v3

    def spy(context: fake.IExecutionContext, handle: int) -> bool:
        enqueued.append(handle)
        return real(context, handle)

    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", spy)
    _buffers, call = (rtx_bench if for_rtx else bench).bind(inputs(2))
    assert launches(gpu, call, 4) == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert len(enqueued) == 2


@pytest.mark.parametrize("for_rtx", [False, True])
def test_what_cannot_be_captured_goes_on_plainly_and_says_so_once(
    tiny: Path, engine: Path, gpu: FakeCuda, for_rtx: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(engine, tiny, PROFILES, capturable=0)
    device = fake_device(gpu, for_rtx=for_rtx)
    bench = Bench(device, device.stream("steps"), engine, tiny)
    buffers, call = bench.bind(inputs(2))
    counts = launches(gpu, call, 4)
    assert counts == [(0, 0)] * 4 if for_rtx else [(0, 0), (1, 0), (1, 0), (1, 0)]
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("tiny.engine runs without CUDA graphs, which makes each step slower: TensorRT ")


def test_a_second_call_of_an_engine_that_cannot_be_captured_does_not_try(
    tiny: Path, bench: Bench, gpu: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    write_engine(bench.engine, tiny, PROFILES, capturable=0)
    buffers, _call = bench.bind(inputs(2))
    engine = bench.device.load(bench.engine, bench.stream)
    for _ in range(2):
        launches(gpu, engine.bind(buffers), 3)
        bench.stream.record().wait()
    assert gpu.calls["cudaStreamBeginCapture"] == 1
    assert caplog.text.count("runs without CUDA graphs") == 1


@pytest.mark.parametrize(
    ("function", "status"),
    [
        ("cudaStreamBeginCapture", "cudaErrorIllegalState"),
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated"),
        ("cudaGraphInstantiate", "cudaErrorMemoryAllocation"),
    ],
)
def test_a_capture_that_fails_costs_only_the_graph(
    bench: Bench, gpu: FakeCuda, function: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    buffers, call = bench.bind(inputs(2))
    call.launch()
    if function == "cudaStreamEndCapture":  # planted, it would leave the stream capturing
        gpu.cudaStreamEndCapture = spoilt(gpu)  # type: ignore[method-assign]
    else:
        gpu.fail(function, status)
    for _ in range(2):
        call.launch()
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))
    assert caplog.text.count("runs without CUDA graphs") == 1
    assert (gpu.graphs, gpu.calls["cudaGraphLaunch"]) == (0, 0)


def spoilt(gpu: FakeCuda) -> Any:
    real = gpu.cudaStreamEndCapture

    def end(stream: int) -> Any:
        capture = gpu._streams[stream].capture
        assert capture is not None
        capture.broken = True
        return real(stream)

    return end


def test_streams_that_tensorrt_adds_are_part_of_the_graph(tiny: Path, bench: Bench, gpu: FakeCuda) -> None:
    write_engine(bench.engine, tiny, PROFILES, aux_streams=1)
    buffers, call = bench.bind(inputs(2))
    for seed in range(4):
        given = inputs(2, seed=seed)
        bench.write(buffers, given)
        call.launch()
        np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(given))
    assert gpu.calls["cudaGraphLaunch"] == 3


def test_a_refused_step_is_an_error_with_what_tensorrt_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _buffers, call = bench.bind(inputs(2))
    real = fake.IExecutionContext.execute_async_v3
    monkeypatch.setattr(
        fake.IExecutionContext, "execute_async_v3", lambda self, _: self._refuse("Myelin ran out of luck")
    )
    with pytest.raises(EngineError, match=r"TensorRT failed to run a step\. Myelin ran out of luck") as raised:
        call.launch()
    assert not isinstance(raised.value, DeviceLost)
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", real)
    call.launch()


def test_a_refused_graph_is_an_error(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    launches(gpu, call, 2)
    gpu.fail("cudaGraphLaunch", "cudaErrorLaunchOutOfResources")
    with pytest.raises(EngineError, match="CUDA error 701"):
        call.launch()
    call.launch()


@pytest.mark.parametrize("launched", [0, 1, 2])
def test_a_lost_device_is_told_by_every_kind_of_launch(bench: Bench, gpu: FakeCuda, launched: int) -> None:
    _buffers, call = bench.bind(inputs(2))
    launches(gpu, call, launched)
    bench.stream.record().wait()
    gpu.lose("cudaErrorLaunchFailure")
    if launched == 0:  # TensorRT gives what it has, and the stream tells
        call.launch()
        with pytest.raises(DeviceLost):
            bench.stream.record()
    else:
        with pytest.raises(DeviceLost, match="CUDA error 719"):
            call.launch()


def test_a_refusal_on_a_lost_device_is_told_as_that(
    bench: Bench, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    _buffers, call = bench.bind(inputs(2))
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: False)
    gpu.lose("cudaErrorIllegalAddress")
    with pytest.raises(DeviceLost, match="CUDA error 700"):
        call.launch()


def test_what_was_logged_before_a_success_is_not_blamed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _buffers, call = bench.bind(inputs(2))
    logger_for(fake).log(fake.ILogger.ERROR, "an old trouble")
    call.launch()
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: False)
    _buffers, call = bench.bind(inputs(2))
    with pytest.raises(EngineError, match=r"^TensorRT failed to run a step\.$"):
        call.launch()


# Scratch


def test_two_streams_have_scratch_of_their_own(bench: Bench, gpu: FakeCuda) -> None:
    other = replace(bench, stream=bench.device.stream("pictures"))
    (buffers, steps), (others, pictures) = bench.bind(inputs(2)), other.bind(inputs(3))
    assert bench.device.memory()["scratch"] == 2 * fake.SCRATCH
    with gpu.gate(bench.stream.handle):
        for _ in range(3):
            steps.launch()
            pictures.launch()
        np.testing.assert_array_equal(other.read(others["y"]), bench.expected(inputs(3)))
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))


def test_the_scratch_of_a_stream_is_that_of_its_largest_engine(tiny: Path, bench: Bench) -> None:
    large = write_engine(bench.engine.with_name("large.engine"), tiny, PROFILES, scratch=3 * fake.SCRATCH)
    bench.device.load(large, bench.stream)
    bound = [bench.bind(inputs(2)), replace(bench, engine=large).bind(inputs(2))]
    assert bench.device.memory()["scratch"] == 3 * fake.SCRATCH
    assert len(bound) == 2


def test_a_larger_engine_that_comes_later_leaves_the_earlier_calls_theirs(tiny: Path, bench: Bench) -> None:
    buffers, small = bench.bind(inputs(2))
    write_engine(bench.engine, tiny, PROFILES, scratch=3 * fake.SCRATCH)
    others, large = bench.bind(inputs(3))
    assert bench.device.memory()["scratch"] == 4 * fake.SCRATCH
    for _ in range(3):
        small.launch()
        large.launch()
    np.testing.assert_array_equal(bench.read(buffers["y"]), bench.expected(inputs(2)))
    np.testing.assert_array_equal(bench.read(others["y"]), bench.expected(inputs(3)))
    del small
    assert bench.device.memory()["scratch"] == 3 * fake.SCRATCH


# What does not fit


def test_a_shape_that_no_profile_takes_is_told_with_those_built(any_bench: Bench) -> None:
    expected = (
        "tiny.engine has no profile for x (5, 4), row (5,). It was built for "
        "x (1, 4) to (2, 4), row (1,) to (2,); x (1, 4) to (4, 4), row (1,) to (4,). "
        "Request a supported shape, or rebuild with other --rows or --resolution."
    )
    with pytest.raises(EngineError, match=re.escape(expected)):
        any_bench.bind(inputs(5))


def test_shapes_of_another_rank_are_told(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"no profile for row \(2, 1\)\."):
        bench.bind({**inputs(2), "row": np.zeros((2, 1), np.int64)})


def test_a_type_that_is_not_the_graphs_is_told(any_bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tiny\.engine takes row as int64, was given int32"):
        any_bench.bind({**inputs(2), "row": np.zeros(2, np.int32)})


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_names_that_are_not_the_graphs_are_told(bench: Bench, change: str) -> None:
    given = inputs(2) | {"z": np.zeros(1)} if change == "more" else {"x": inputs(2)["x"]}
    with pytest.raises(EngineError, match=r"takes \['row', 'table', 'x', 'y'\], was given \['"):
        bench.bind(given)


class Elsewhere:
    """A buffer and a stream of another device."""

    shape = (2, WIDTH)


def test_what_is_of_another_device_is_refused(bench: Bench) -> None:
    foreign: Any = Elsewhere()
    with pytest.raises(EngineError, match="works on GPU memory, was given Elsewhere"):
        bench.device.load(bench.engine, bench.stream).bind(dict.fromkeys(("x", "row", "table", "y"), foreign))
    with pytest.raises(EngineError, match="works on CUDA streams, was given Elsewhere"):
        bench.device.load(bench.engine, foreign)


def test_an_output_of_another_shape_is_not_written_past_its_end(any_bench: Bench) -> None:
    buffers, _call = any_bench.bind(inputs(2))
    buffers["y"] = any_bench.device.allocate((1, WIDTH), np.float32)
    with pytest.raises(EngineError, match=r"computes y as \(2, 4\), was given \(1, 4\)"):
        any_bench.device.load(any_bench.engine, any_bench.stream).bind(buffers)


def test_inputs_that_do_not_go_together_are_told(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tiny\.engine cannot combine these input shapes: dimensions"):
        bench.bind({**inputs(2), "row": np.zeros(1, np.int64)})


def test_a_type_that_numpy_lacks_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.ICudaEngine, "get_tensor_dtype", lambda *_: fake.DataType.BF16)
    with pytest.raises(EngineError, match=r"tiny\.engine: x is DataType\.BF16, which numpy does not support"):
        bench.device.load(bench.engine, bench.stream)


def test_an_engine_that_does_not_fit_into_memory_says_who_holds_it(engine: Path) -> None:
    device = fake_device(FakeCuda(total=8192))
    stream = device.stream("steps")
    held = device.allocate((8000,), np.uint8, purpose="state")
    with pytest.raises(EngineError, match=r"does not fit into the GPU's memory: .*uses state 0\.0 MiB; .*--rows"):
        device.load(engine, stream)
    del held
    device.load(engine, stream)


# What TensorRT refuses

REFUSALS = {
    "create_execution_context": (None, "create an execution context"),
    "set_optimization_profile_async": (False, "select profile 0"),
    "set_input_shape": (False, "set the shape of x"),
    "infer_shapes": (["x"], r"infer the shapes of \['x'\]"),
    "set_tensor_address": (False, "set the address of x"),
}


@pytest.mark.parametrize("method", REFUSALS)
def test_each_refusal_in_binding_is_an_error(bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, text = REFUSALS[method]
    owner = fake.ICudaEngine if method == "create_execution_context" else fake.IExecutionContext
    monkeypatch.setattr(owner, method, lambda *_: answer)
    with pytest.raises(EngineError, match=f"TensorRT failed to {text}"):
        bench.bind(inputs(2))


def test_warnings_and_errors_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = logger_for(fake)
    log.take()
    for severity, text in enumerate(["internal", "error", "warning", "info", "verbose"]):
        log.log(fake.Severity(severity), text)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "internal"),
        ("ERROR", "error"),
        ("WARNING", "warning"),
    ]
    assert log.take() == "internal error"


def test_a_corrupted_file_is_not_loaded(any_bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "broken.engine").write_bytes(b"not an engine")
    with pytest.raises(EngineError, match=r"failed to load .*broken\.engine: rebuild it .*\. \S+"):
        any_bench.device.load(tmp_path / "broken.engine", any_bench.stream)


def test_a_missing_file_is_told(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.engine cannot be read"):
        bench.device.load(tmp_path / "none.engine", bench.stream)


def test_a_runtime_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_logger: fake.ILogger) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", refuse)
    with pytest.raises(EngineError, match="TensorRT does not start: pybind11"):
        fake_device()


def test_a_device_names_its_gpu_and_version(bench: Bench, rtx_bench: Bench) -> None:
    assert bench.device.name == "Fake, TensorRT 11.4.0.106"
    assert rtx_bench.device.name == "Fake, TensorRT for RTX 1.7.1.116"
    assert bench.device.pads


# The runtime cache of TensorRT for RTX


def compiled(bench: Bench, rows: int = 2) -> int:
    """How many kernels a fresh engine compiles for one call."""
    buffers, _call = bench.bind(inputs(rows))
    engine = bench.device.load(bench.engine, bench.stream)
    call = engine.bind(buffers)
    for _ in range(3):
        call.launch()
    bench.stream.record().wait()
    bench.device.end_warm_up()
    return len(engine._engine._compiled)


@pytest.fixture
def cache(engine: Path) -> Path:
    return engine.with_name("tiny.engine.cache")


def test_what_was_compiled_is_kept_for_the_next_start(rtx_bench: Bench, cache: Path) -> None:
    assert compiled(rtx_bench) == 1
    assert cache.stat().st_mode & 0o777 == 0o600
    assert sorted(cache.parent.iterdir()) == [rtx_bench.engine, cache]
    assert compiled(rtx_bench) == 0
    assert compiled(rtx_bench, rows=3) == 1
    assert len(json.loads(cache.read_bytes())["kernels"]) == 2


def test_the_cache_is_written_only_when_something_was_added(rtx_bench: Bench, cache: Path) -> None:
    compiled(rtx_bench)
    before = cache.stat()
    compiled(rtx_bench)
    rtx_bench.device.end_warm_up()
    assert cache.stat().st_ino == before.st_ino
    cache.unlink()
    rtx_bench.device.end_warm_up()
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"no cache", b'{"version": "1.6", "kernels": ["x"]}'], ids=str)
def test_a_cache_that_is_damaged_or_old_is_left_out_and_replaced(
    rtx_bench: Bench, cache: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_bytes(content)
    cache.chmod(0o600)
    assert compiled(rtx_bench) == 1
    assert f"{cache} is damaged, or of another GPU, driver or version" in caplog.text
    assert compiled(rtx_bench) == 0


@pytest.mark.parametrize(("mode", "why"), [(0o620, "written by others"), (0o602, "written by others")])
def test_a_cache_that_others_may_write_is_not_read(
    rtx_bench: Bench, cache: Path, mode: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(rtx_bench)
    cache.chmod(mode)
    assert compiled(rtx_bench) == 1
    assert "is ignored" in caplog.text
    assert why in caplog.text
    assert cache.stat().st_mode & 0o777 == 0o600, "its successor is ours alone"


def test_a_cache_of_somebody_else_is_not_read(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(rtx_bench)
    owner = cache.stat().st_uid
    if owner == 0:  # root's files are everybody's
        os.chown(cache, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert compiled(rtx_bench) == 1
    assert "belongs to another user" in caplog.text


def test_neither_links_nor_pipes_are_read(
    rtx_bench: Bench, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").write_bytes(b"{}")
    cache.symlink_to(tmp_path / "elsewhere")
    rtx_bench.bind(inputs(2))
    cache.unlink()
    os.mkfifo(cache)
    rtx_bench.bind(inputs(2))
    assert caplog.text.count("is ignored") == 2


def test_a_folder_that_cannot_be_written_is_said(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(cache.parent))

    monkeypatch.setattr("engines.files.temporary_for", refuse)
    assert compiled(rtx_bench) == 1
    assert (
        "compiled for tiny.engine cannot be saved, and are compiled again at the next start: [Errno 13]" in caplog.text
    )
    assert not cache.exists()


def test_a_write_that_breaks_off_leaves_the_old_cache(
    rtx_bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(rtx_bench)
    before = cache.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    compiled(rtx_bench, rows=3)
    assert cache.read_bytes() == before
    assert sorted(cache.parent.iterdir()) == [rtx_bench.engine, cache]


def test_a_package_without_a_cache_is_said(
    rtx_bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake.IRuntimeConfig, "set_runtime_cache", lambda *_: False)
    rtx_bench.bind(inputs(2))
    assert "accepts no cache for tiny.engine" in caplog.text


def test_kernels_are_compiled_before_they_are_captured(rtx_bench: Bench) -> None:
    engine = rtx_bench.device.load(rtx_bench.engine, rtx_bench.stream)
    contexts = engine._contexts
    assert isinstance(contexts, rtx.RtxContexts)
    config: fake.IRuntimeConfig = contexts._runtime_config
    assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert config.cuda_graph_strategy.name == "DISABLED"


# The graphs of a bundle


@pytest.mark.parametrize("graph", get_args(GraphName))
def test_the_graphs_of_the_demo_compute_in_the_fake_what_they_do_in_onnx_runtime(
    graph: GraphName, tmp_path: Path, gpu: FakeCuda
) -> None:
    manifest = Manifest.load(DEMO)
    source, device = DEMO / "onnx" / f"{graph}.onnx", fake_device(gpu)
    stream = device.stream("work")
    path = write_bundle_engine(tmp_path / f"{graph}.engine", source, graph, manifest)
    engine, session = device.load(path, stream), ort.InferenceSession(source)
    assert len(engine._profiles) == len(shapes(manifest, graph))
    second = engine._profiles[:2][-1]  # two rows of the smallest size
    dice = np.random.default_rng(0)
    given = {name: numbers(second[name][1], engine._dtypes[name], dice) for name in engine._inputs}
    outputs = [one.name for one in session.get_outputs()]
    expected = dict(zip(outputs, session.run(outputs, given), strict=True))
    buffers: dict[str, Buffer] = {
        name: device.allocate(array.shape, array.dtype) for name, array in {**given, **expected}.items()
    }
    for name, array in given.items():
        stream.write(buffers[name], array)
    call = engine.bind(buffers)
    for _ in range(3):
        call.launch()
    for name, array in expected.items():
        np.testing.assert_allclose(stream.read(buffers[name]).result(), array, atol=1e-5)


def numbers(shape: tuple[int, ...], dtype: np.dtype[Any], dice: np.random.Generator) -> Array:
    """What every graph takes: small numbers, and indices of what is there."""
    return dice.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)


# The fake, held against the real packages


@pytest.mark.parametrize("name", sorted({*fake.__all__, *fake.RTX_NAMES}))
def test_the_fake_has_only_names_that_are_real(name: str) -> None:
    real = getattr(tensorrt_rtx, name)
    for faked in (getattr(fake, name, None), fake.RTX_NAMES.get(name)):
        if isinstance(faked, type):
            assert public(faked) <= set(dir(real))


def public(kind: type) -> set[str]:
    """What a fake's class, and those that it is made from, have by themselves."""
    own = [one for one in kind.__mro__ if one.__module__ == fake.__name__]
    return {member for one in own for member in vars(one) if not member.startswith("_")}


def test_the_fake_logs_by_the_real_severities() -> None:
    for severity in fake.Severity:
        assert getattr(tensorrt_rtx.ILogger.Severity, severity.name).value == severity.value


@pytest.mark.parametrize("dtype", fake.DataType)
def test_the_fake_knows_types_as_the_real_one_does(dtype: fake.DataType) -> None:
    real = getattr(tensorrt_rtx.DataType, dtype.name)
    if dtype is fake.DataType.BF16:
        for nptype, unknown in ((tensorrt_rtx.nptype, real), (fake.nptype, dtype)):
            with pytest.raises(TypeError, match="equivalent numpy datatype"):
                nptype(unknown)
    else:
        assert np.dtype(tensorrt_rtx.nptype(real)) == np.dtype(fake.nptype(dtype))


def made_context(path: Path, gpu: FakeCuda) -> fake.IExecutionContext:
    Cuda(gpu)
    engine = fake.Runtime(logger_for(fake)).deserialize_cuda_engine(path.read_bytes())
    assert engine is not None
    return engine.create_execution_context(fake.ExecutionContextAllocationStrategy.USER_MANAGED)


def test_the_fake_refuses_what_comes_out_of_order(engine: Path, gpu: FakeCuda) -> None:
    context, stream = made_context(engine, gpu), CudaStream(Cuda(gpu)).handle
    kept = CudaStream(Cuda(gpu))
    stream = kept.handle
    assert not context.set_input_shape("x", (2, WIDTH)), "before the profile"
    assert not context.set_optimization_profile_async(2, stream), "of two"
    assert not context.set_optimization_profile_async(0, 7), "no stream"
    assert context.set_optimization_profile_async(0, stream)
    assert not context.set_input_shape("x", (3, WIDTH)), "outside the profile"
    assert context.set_input_shape("x", (2, WIDTH))
    assert context.infer_shapes() == ["row", "table"]
    assert not context.set_tensor_address("x", 0)
    assert not context.set_tensor_address("x", 8)
    assert not context.set_tensor_address("z", 256)
    assert not context.execute_async_v3(stream), "without shapes, addresses and memory"


def faults(bench: Bench, gpu: FakeCuda) -> list[str]:
    """What has gone wrong up to now."""
    with pytest.raises(DeviceLost):
        bench.stream.record().wait()
    found, gpu.faults = gpu.faults, []
    return found


def test_the_fake_notices_scratch_that_two_streams_share(bench: Bench, gpu: FakeCuda) -> None:
    other = bench.device.stream("pictures")
    bench.device._scratch[other] = bench.device._scratch.setdefault(bench.stream, tensorrt.Scratch(bench.device._cuda))
    calls = [bench.bind(inputs(2))[1], replace(bench, stream=other).bind(inputs(2))[1]]
    for call in calls:
        call.launch()
    assert "is given to stream" in faults(bench, gpu)[0]


def test_the_fake_notices_a_context_on_two_streams(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    call.launch()
    call._stream = bench.device.stream("pictures")
    call._ran = False
    call.launch()
    assert "one context runs on two streams" in faults(bench, gpu)


def test_the_fake_notices_that_a_captured_context_is_changed(bench: Bench, gpu: FakeCuda) -> None:
    _buffers, call = bench.bind(inputs(2))
    for _ in range(2):
        call.launch()
    call._context.set_input_shape("x", (1, WIDTH))
    assert "which its captured graph does not notice" in faults(bench, gpu)[0]


def test_the_fake_notices_memory_that_went_before_its_call(bench: Bench, gpu: FakeCuda) -> None:
    buffers, call = bench.bind(inputs(2))
    output = buffers["y"]
    assert isinstance(output, DeviceBuffer)
    bench.stream.record().wait()
    gpu.give_back(output.address)
    call.launch()
    assert "are not in allocated device memory" in faults(bench, gpu)[0]
    buffers.clear()  # the fake was given its memory back already
    del output, call
    gpu.faults.clear()


# TensorRT for RTX itself, which is here, where the GPU is not


@NO_GPU
def test_without_a_driver_a_real_engine_is_not_loaded_and_the_log_says_why(rtx_engine: Path) -> None:
    device = TensorRtDevice(tensorrt_rtx, Cuda(FakeCuda()), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"failed to load .*tiny\.rtx: rebuild it .*cudaError 35"):
        device.load(rtx_engine, device.stream("steps"))


def test_the_real_runtime_loads_no_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "broken.rtx").write_bytes(b"not an engine" * 100)
    device = TensorRtDevice(tensorrt_rtx, Cuda(FakeCuda()), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"failed to load .*broken\.rtx: rebuild it .*magicTag"):
        device.load(tmp_path / "broken.rtx", device.stream("steps"))


@NO_GPU
@pytest.mark.parametrize(("opener", "backend"), [(tensorrt, "tensorrt"), (rtx, "tensorrt_rtx")])
def test_without_a_gpu_the_backend_says_what_to_take(opener: Any, backend: str) -> None:
    with pytest.raises(EngineError, match=f"Backend {backend} needs an NVIDIA GPU.*use the backend onnxruntime"):
        opener.open_device(threads=0)


def test_without_the_package_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "probe", lambda: Probe(FAKE_GPU))
    with pytest.raises(
        EngineError, match=f"Backend no_such_trt needs its package .*{re.escape(install_command('cuda'))}"
    ):
        open_package("no_such_trt", extra="cuda")


# Told before loading


def build(version: str, gpu: Gpu | None) -> Build:
    return Build.model_construct(version=version, gpu=gpu, engines={})


L4 = Gpu(name="NVIDIA L4", compute_capability="8.9")
RTX_4090 = Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9")
A10 = Gpu(name="NVIDIA A10", compute_capability="8.6")
RTX_5090 = Gpu(name="NVIDIA GeForce RTX 5090", compute_capability="12.0")
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0")

FITS = [
    ("tensorrt", "11.4.0.106", L4, "11.4.0.106", L4),
    ("tensorrt", "11.4.0.106", L4, "11.4.0.200", RTX_4090),
    ("tensorrt", "11.4.0.106", H200, "11.4.0.106", H200),
    ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", A10),
    ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", RTX_5090),
    ("tensorrt_rtx", "1.7.1.116", L4, "1.7.1.116", RTX_4090),
]
MISFITS = [
    (
        ("tensorrt", "11.4.0.106", L4, "11.3.1.2", A10),
        "The tensorrt engines in bundles/sd were built by TensorRT 11.4.0 for NVIDIA L4 (compute capability 8.9); "
        "this machine has TensorRT 11.3.1 and NVIDIA A10 (compute capability 8.6). "
        "Rebuild them on this machine: python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.1.1", L4), "this machine has TensorRT 11.4.1 and NVIDIA L4"),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", A10), "this machine has TensorRT 11.4.0 and NVIDIA A10"),
    (
        ("tensorrt_rtx", "1.6.0.9", None, "1.7.1.116", A10),
        "were built by TensorRT for RTX 1.6.0; "
        "this machine has TensorRT for RTX 1.7.1 and NVIDIA A10 (compute capability 8.6). "
        "Rebuild them on this machine: python build_engines.py compile bundles/sd --backend tensorrt_rtx",
    ),
    (("tensorrt_rtx", "1.7.1.116", L4, "1.7.1.116", A10), "for NVIDIA L4 (compute capability 8.9); this machine has"),
    (
        ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", H200),
        "TensorRT for RTX 1.7.1 supports compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; "
        "this machine has NVIDIA H200 (compute capability 9.0). Build engines that run on it: "
        "python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", None), "need an NVIDIA GPU, and this machine has none"),
]
Case = tuple[str, str, Gpu | None, str, Gpu | None]


def check_case(case: Case) -> None:
    backend, built_version, built_gpu, version, gpu = case
    check_fits(build(built_version, built_gpu), backend=backend, version=version, gpu=gpu, bundle=Path("bundles/sd"))


@pytest.mark.parametrize("case", FITS, ids=str)
def test_engines_that_fit_are_taken(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize(("case", "message"), MISFITS, ids=str)
def test_engines_that_do_not_fit_say_what_to_build(case: Case, message: str) -> None:
    with pytest.raises(EngineError, match=re.escape(message)):
        check_case(case)
