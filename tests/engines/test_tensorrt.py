"""TensorRT's engines over a fake of its runtime; where there is a GPU, over the real ones as well."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx

from engines import onnxruntime_cuda, tensorrt
from engines import tensorrt_rtx as rtx
from engines.base import Array, Buffer, Call, Device, EngineError
from engines.cuda import probe
from engines.host import HostBuffer
from engines.manifest import Build, Gpu
from engines.onnxruntime import OnnxRuntimeDevice
from engines.tensorrt import TensorRtDevice, check_fits, open_package
from tests.engines import fake_tensorrt as fake
from tests.engines.fake_tensorrt import HostMemory, Profile, host_stream, write_engine

FOUND = probe()
NO_GPU = pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
FAKE_GPU = Gpu(name="Fake", compute_capability="8.9")

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
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
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
    """A device, its engine of the tiny graph, and what ONNX Runtime makes of that."""

    device: Device
    engine: Path
    onnx: Path

    def bind(self, given: dict[str, Array]) -> tuple[dict[str, Buffer], Call]:
        buffers = {name: self.device.allocate(array.shape, array.dtype) for name, array in given.items()}
        for name, array in given.items():
            buffers[name].write(array)
        buffers["y"] = self.device.allocate(given["x"].shape, np.float32)
        return buffers, self.device.load(self.engine).bind(buffers)

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
def bench(tiny: Path, tmp_path: Path) -> Bench:
    """The fake's."""
    device = TensorRtDevice(fake, host_stream(), gpu=FAKE_GPU)
    return Bench(device, write_engine(tmp_path / "tiny.engine", tiny, PROFILES), tiny)


def why_not(package: str) -> str:
    """Why `package` cannot run here; empty where it can."""
    if FOUND.gpu is None or find_spec(package) is None:
        return FOUND.reason or f"{package} is not installed"
    accepted = tensorrt.accepted_capabilities(package)
    unfit = accepted and FOUND.gpu.compute_capability not in accepted
    return f"{package} does not run on {FOUND.gpu.compute_capability}" if unfit else ""


def on_a_gpu(package: str) -> Any:
    reason = why_not(package)
    return pytest.param(package, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)])


@pytest.fixture(params=["fake", on_a_gpu("tensorrt_rtx"), on_a_gpu("tensorrt")])
def any_bench(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Iterator[Bench]:
    """The fake's, and on a GPU the real ones'."""
    if request.param == "fake":
        yield request.getfixturevalue("bench")
    else:
        engine = compile_apart(request.param, tiny, tmp_path / "tiny.engine")
        yield Bench(open_package(request.param, extra="cuda"), engine, tiny)


# What an engine computes


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_an_engine_computes_what_onnx_runtime_does(any_bench: Bench, rows: int) -> None:
    given = inputs(rows)
    buffers, call = any_bench.bind(given)
    call.run()
    np.testing.assert_array_equal(buffers["y"].read(), any_bench.expected(given))


def test_a_call_runs_again_on_new_contents(any_bench: Bench) -> None:
    buffers, call = any_bench.bind(inputs(2))
    for seed in range(3):
        given = inputs(2, seed=seed)
        for name, array in given.items():
            buffers[name].write(array)
        call.run()
        np.testing.assert_array_equal(buffers["y"].read(), any_bench.expected(given))


def test_calls_of_one_engine_take_turns(any_bench: Bench) -> None:
    """They share its scratch; and what one computed may be what another reads."""
    engine, allocate = any_bench.device.load(any_bench.engine), any_bench.device.allocate
    given = inputs(2)
    first, second = allocate((2, WIDTH), np.float32), allocate((2, WIDTH), np.float32)
    shared = {name: allocate(given[name].shape, given[name].dtype) for name in ("row", "table")}
    there = engine.bind({**shared, "x": first, "y": second})
    back = engine.bind({**shared, "x": second, "y": first})
    for name, buffer in {**shared, "x": first}.items():
        buffer.write(given[name])
    for call in (there, back):
        call.run()
    once = any_bench.expected(given)
    np.testing.assert_array_equal(second.read(), once)
    np.testing.assert_array_equal(first.read(), any_bench.expected({**given, "x": once}))


def test_a_call_outlives_its_engine_and_buffers(bench: Bench) -> None:
    given = inputs(2)
    buffers, call = bench.bind(given)
    output = buffers.pop("y")
    buffers.clear()
    call.run()
    np.testing.assert_array_equal(output.read(), bench.expected(given))


def test_memory_is_freed_with_the_last_call(tiny: Path, tmp_path: Path) -> None:
    memory = HostMemory()
    device = TensorRtDevice(fake, host_stream(memory=memory), gpu=FAKE_GPU)
    made = Bench(device, write_engine(tmp_path / "tiny.engine", tiny, PROFILES), tiny).bind(inputs(2))
    assert len(memory.live) == 5  # three inputs, an output and the scratch
    del made
    assert not memory.live


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


# What does not fit


def test_a_shape_that_no_profile_takes_is_told_with_those_built(any_bench: Bench) -> None:
    expected = (
        "tiny.engine has no profile for x (5, 4), row (5,). It was built for "
        "x (1, 4) to (2, 4), row (1,) to (2,); x (1, 4) to (4, 4), row (1,) to (4,). "
        "Ask for less, or build it with other --rows or --resolution."
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


def test_memory_of_the_host_is_refused(bench: Bench) -> None:
    buffers: dict[str, Buffer] = {name: HostBuffer(array) for name, array in inputs(2).items()}
    with pytest.raises(EngineError, match="computes in the GPU's memory, was given HostBuffer"):
        bench.device.load(bench.engine).bind({**buffers, "y": HostBuffer(np.zeros((2, WIDTH)))})


def test_an_output_of_another_shape_is_not_written_past_its_end(any_bench: Bench) -> None:
    buffers, _call = any_bench.bind(inputs(2))
    buffers["y"] = any_bench.device.allocate((1, WIDTH), np.float32)
    with pytest.raises(EngineError, match=r"computes y as \(2, 4\), was given \(1, 4\)"):
        any_bench.device.load(any_bench.engine).bind(buffers)


def test_inputs_that_do_not_go_together_are_told(bench: Bench) -> None:
    with pytest.raises(EngineError, match=r"tiny\.engine cannot take these shapes together: dimensions"):
        bench.bind({**inputs(2), "row": np.zeros(1, np.int64)})


def test_a_type_that_numpy_lacks_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.ICudaEngine, "get_tensor_dtype", lambda *_: fake.DataType.BF16)
    with pytest.raises(EngineError, match=r"tiny\.engine: x is DataType\.BF16, which numpy lacks"):
        bench.device.load(bench.engine)


# What TensorRT refuses

REFUSALS = {
    "create_execution_context": (None, "create a context"),
    "set_optimization_profile_async": (False, "take profile 0"),
    "set_input_shape": (False, "take the shape of x"),
    "infer_shapes": (["x"], r"infer the shapes of \['x'\]"),
    "set_tensor_address": (False, "take the memory of x"),
}


@pytest.mark.parametrize("method", REFUSALS)
def test_each_refusal_in_binding_is_an_error(bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, text = REFUSALS[method]
    owner = fake.ICudaEngine if method == "create_execution_context" else fake.IExecutionContext
    monkeypatch.setattr(owner, method, lambda *_: answer)
    with pytest.raises(EngineError, match=f"TensorRT did not {text}"):
        bench.bind(inputs(2))


def test_a_refused_step_is_an_error_with_what_tensorrt_logged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _buffers, call = bench.bind(inputs(2))
    monkeypatch.setattr(
        fake.IExecutionContext, "execute_async_v3", lambda self, _: self._refuse("Myelin ran out of luck")
    )
    with pytest.raises(EngineError, match=r"TensorRT did not run a step\. Myelin ran out of luck"):
        call.run()


def test_what_was_logged_before_a_success_is_not_blamed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _buffers, call = bench.bind(inputs(2))
    tensorrt._log_of(fake).log(fake.ILogger.ERROR, "an old trouble")
    call.run()
    monkeypatch.setattr(fake.IExecutionContext, "execute_async_v3", lambda *_: False)
    with pytest.raises(EngineError, match=r"^TensorRT did not run a step\.$"):
        call.run()


def test_warnings_and_errors_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    log = tensorrt._log_of(fake)
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
    with pytest.raises(EngineError, match=r"did not load .*broken\.engine; build it .*\. \S+"):
        any_bench.device.load(tmp_path / "broken.engine")


def test_a_missing_file_is_told(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.engine cannot be read"):
        bench.device.load(tmp_path / "none.engine")


def test_a_runtime_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_logger: fake.ILogger) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", refuse)
    with pytest.raises(EngineError, match="TensorRT does not start: pybind11"):
        TensorRtDevice(fake, host_stream(), gpu=FAKE_GPU)


def test_a_device_names_its_gpu_and_version(bench: Bench) -> None:
    assert bench.device.name == "Fake, TensorRT 11.4.0.106"


# The fake, held against the real package


@pytest.mark.parametrize("name", fake.__all__)
def test_the_fake_has_only_names_that_are_real(name: str) -> None:
    real, faked = getattr(tensorrt_rtx, name), getattr(fake, name)
    if isinstance(faked, type):
        assert {member for member in vars(faked) if not member.startswith("_")} <= set(dir(real))


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
        assert tensorrt_rtx.nptype(real) is fake.nptype(dtype)


def test_the_fake_refuses_what_comes_out_of_order(tiny: Path, tmp_path: Path) -> None:
    content = write_engine(tmp_path / "tiny.engine", tiny, PROFILES).read_bytes()
    engine = fake.Runtime(tensorrt._log_of(fake)).deserialize_cuda_engine(content)
    assert engine is not None
    context = engine.create_execution_context(fake.ExecutionContextAllocationStrategy.USER_MANAGED)
    stream = host_stream().handle
    assert not context.set_input_shape("x", (2, WIDTH)), "before the profile"
    assert not context.set_optimization_profile_async(2, stream), "of two"
    assert context.set_optimization_profile_async(0, stream)
    assert not context.set_input_shape("x", (3, WIDTH)), "outside the profile"
    assert context.set_input_shape("x", (2, WIDTH))
    assert context.infer_shapes() == ["row", "table"]
    assert not context.set_tensor_address("x", 0)
    assert not context.set_tensor_address("z", 256)
    assert not context.execute_async_v3(stream), "without shapes, addresses and memory"


# TensorRT for RTX itself, which is here, where the GPU is not


@NO_GPU
def test_without_a_driver_a_real_engine_is_not_loaded_and_the_log_says_why(rtx_engine: Path) -> None:
    device = TensorRtDevice(tensorrt_rtx, host_stream(), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"did not load .*tiny\.rtx; build it .*cudaError 35"):
        device.load(rtx_engine)


def test_the_real_runtime_loads_no_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "broken.rtx").write_bytes(b"not an engine" * 100)
    device = TensorRtDevice(tensorrt_rtx, host_stream(), gpu=FAKE_GPU)
    with pytest.raises(EngineError, match=r"did not load .*broken\.rtx; build it .*magicTag"):
        device.load(tmp_path / "broken.rtx")


@NO_GPU
@pytest.mark.parametrize(("opener", "backend"), [(tensorrt, "tensorrt"), (rtx, "tensorrt_rtx")])
def test_without_a_gpu_the_backend_says_what_to_take(opener: Any, backend: str) -> None:
    with pytest.raises(EngineError, match=f"Backend {backend} needs an NVIDIA GPU.*take the backend onnxruntime"):
        opener.open_device(threads=0)


def test_without_the_package_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "probe", lambda: type(FOUND)(FAKE_GPU))
    with pytest.raises(EngineError, match=r"Backend no_such_trt needs its package .*pip install 'latentd\[cuda\]'"):
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
        "here are TensorRT 11.3.1 and NVIDIA A10 (compute capability 8.6). "
        "Build them here: python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.1.1", L4), "here are TensorRT 11.4.1 and NVIDIA L4"),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", A10), "here are TensorRT 11.4.0 and NVIDIA A10"),
    (
        ("tensorrt_rtx", "1.6.0.9", None, "1.7.1.116", A10),
        "were built by TensorRT for RTX 1.6.0; "
        "here are TensorRT for RTX 1.7.1 and NVIDIA A10 (compute capability 8.6). "
        "Build them here: python build_engines.py compile bundles/sd --backend tensorrt_rtx",
    ),
    (("tensorrt_rtx", "1.7.1.116", L4, "1.7.1.116", A10), "for NVIDIA L4 (compute capability 8.9); here are"),
    (
        ("tensorrt_rtx", "1.7.1.116", None, "1.7.1.116", H200),
        "TensorRT for RTX 1.7.1 runs on compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; here is NVIDIA H200 "
        "(compute capability 9.0). Build engines that it runs: "
        "python build_engines.py compile bundles/sd --backend tensorrt",
    ),
    (("tensorrt", "11.4.0.106", L4, "11.4.0.106", None), "run on an NVIDIA GPU, and there is none here"),
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


# ONNX Runtime on the GPU

NO_CUDA = "CUDAExecutionProvider" not in ort.get_available_providers()


@pytest.mark.skipif(not NO_CUDA, reason="this ONNX Runtime has CUDA")
def test_an_onnx_runtime_without_cuda_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"pip install 'latentd\[cuda\]' in place of 'latentd\[cpu\]'"):
        onnxruntime_cuda.open_device(threads=0)


@NO_GPU
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fall_back_to_the_cpu_is_an_error(tiny: Path) -> None:
    with pytest.raises(EngineError, match="could not start its CUDAExecutionProvider, so it would compute on the CPU"):
        OnnxRuntimeDevice(threads=1, provider=onnxruntime_cuda.PROVIDER).load(tiny)


@pytest.fixture(
    params=[
        "CPUExecutionProvider",
        pytest.param(
            "CUDAExecutionProvider",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(FOUND.gpu is None or NO_CUDA, reason=FOUND.reason or "ONNX Runtime has no CUDA"),
            ],
        ),
    ]
)
def ort_bench(request: pytest.FixtureRequest, tiny: Path) -> Bench:
    return Bench(OnnxRuntimeDevice(threads=1, provider=request.param), tiny, tiny)


def test_onnx_runtime_sees_what_is_written_between_runs(ort_bench: Bench) -> None:
    test_a_call_runs_again_on_new_contents(ort_bench)
