"""ONNX Runtime on the GPU: over fakes of its session and of CUDA; where there is a GPU, over the real ones as well."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engines.backends import onnxruntime_cuda
from engines.backends.cuda import Cuda, CudaStream, DeviceBuffer, Library, probe
from engines.backends.device import ALIGNMENT, Buffer
from engines.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaCall, OnnxRuntimeCudaDevice
from engines.contract import Array
from engines.errors import DeviceLost, EngineError
from tests.engines.backends.fake_cuda import FakeCuda, stream_of

FOUND = probe()
NO_CUDA = PROVIDER not in ort.get_available_providers()
WHY_NOT = FOUND.reason or ("ONNX Runtime has no CUDA" if NO_CUDA else "")
ON_A_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)])
WIDTH = 4
REGULAR_RUNS = 2  # before ONNX Runtime captures


@dataclass(frozen=True)
class Bound:
    """Where a tensor is."""

    device: str
    number: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    address: int


class FakeBinding:
    """ONNX Runtime's IOBinding."""

    def __init__(self) -> None:
        self.places: dict[str, Bound] = {}

    def bind_input(self, name: str, *place: Any) -> None:
        self.places[name] = Bound(*place)

    def bind_output(self, name: str, *place: Any) -> None:
        self.places[name] = Bound(*place)


class FakeSession:
    """A session on the fake GPU's stream, that captures as the real one does: it runs three times, then replays."""

    def __init__(self, cuda: FakeCuda, path: Path, options: Mapping[str, str]) -> None:
        self.options = options
        self.runs: list[str] = []
        self._cuda = cuda
        self._session = ort.InferenceSession(path)
        self._stream = int(options["user_compute_stream"])
        self._graphs: dict[int, Any] = {}
        self._regular: Counter[int] = Counter()  # runs of each number
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        self.breaks: Callable[[], None] = lambda: None

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: ort.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        if graph == -1 or self.options["enable_cuda_graph"] == "0":
            self._give("plain", binding)
        elif graph in self._graphs:
            self._replay(graph)
        else:
            self._capture(graph, binding)

    def _capture(self, graph: int, binding: FakeBinding) -> None:
        """What was captured before a node failed is the graph of that number, if CUDA ended the capture well."""
        cuda, everywhere = self._cuda, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        while self._regular[graph] < REGULAR_RUNS:
            self._regular[graph] += 1
            self._give("regular", binding)
        cuda.cudaStreamBeginCapture(self._stream, everywhere)
        try:
            self.breaks()
            self._give("captured", binding)
        finally:
            status, captured = cuda.cudaStreamEndCapture(self._stream)
            if int(status):
                raise RuntimeError(f"CUDA failure {int(status)}")
            self._graphs[graph] = cuda.cudaGraphInstantiate(captured, 0)[1]
            self._replay(graph)

    def _replay(self, graph: int) -> None:
        self.runs.append("replay")
        status = self._cuda.cudaGraphLaunch(self._graphs[graph], self._stream)[0]
        if int(status):
            raise RuntimeError(f"CUDA failure {int(status)}")

    def _give(self, kind: str, binding: FakeBinding) -> None:
        self.runs.append(kind)
        stream, places = stream_of(self._stream), dict(binding.places)
        assert stream is not None
        inputs, outputs = ([one.name for one in some()] for some in (self.get_inputs, self.get_outputs))

        def compute() -> None:
            values = self._session.run(outputs, {name: self._tensor(places[name]).copy() for name in inputs})
            for name, value in zip(outputs, values, strict=True):
                self._tensor(places[name])[...] = value

        stream.give(compute)

    def _tensor(self, place: Bound) -> Array:
        assert (place.device, place.number) == ("cuda", 0)
        raw = self._cuda.memory(place.address, math.prod(place.shape) * place.dtype.itemsize)
        assert raw is not None
        return raw.view(place.dtype).reshape(place.shape)


class FakeRuntime(SimpleNamespace):
    """The package, with sessions on the fake GPU."""

    __version__ = "1.32.0"
    SessionOptions = ort.SessionOptions

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.sessions: list[FakeSession] = []
        self.refuses_graphs = False
        self.fails = ""

    def InferenceSession(  # noqa: N802 - its name there
        self, path: Path, options: ort.SessionOptions, *, providers: Any, enable_fallback: int
    ) -> FakeSession:
        assert options.log_severity_level == 3
        assert not options.enable_mem_pattern
        assert enable_fallback == 0
        [(provider, settings)] = providers
        assert provider == PROVIDER
        assert all(isinstance(value, str) for value in settings.values())
        if self.fails:
            raise RuntimeError(self.fails)
        if self.refuses_graphs and settings["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature")
        self.sessions.append(FakeSession(self.cuda, path, settings))
        return self.sessions[-1]


def write_onnx(path: Path) -> Path:
    """y = relu(2 x)"""
    value, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [onnx.helper.make_node("Mul", ["x", "two"], ["z"]), onnx.helper.make_node("Relu", ["z"], ["y"])]
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [value("x", real, ["N", WIDTH])],
        [value("y", real, ["N", WIDTH])],
        [onnx.numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@dataclass(frozen=True)
class Bench:
    device: OnnxRuntimeCudaDevice
    stream: CudaStream
    onnx: Path

    def bind(self, rows: int = 2) -> tuple[DeviceBuffer, DeviceBuffer, OnnxRuntimeCudaCall]:
        x, y = (self.device.allocate((rows, WIDTH), np.float32) for _ in range(2))
        return x, y, self.device.load(self.onnx, self.stream).bind({"x": x, "y": y})

    def compute(self, x: DeviceBuffer, y: DeviceBuffer, call: OnnxRuntimeCudaCall, number: float) -> float:
        """What `call` makes of `number`."""
        self.stream.write(x, np.full(x.shape, number))
        call.launch()
        return float(self.stream.read(y).result()[-1, -1])


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """A fake GPU that nothing may go wrong on."""
    made = FakeCuda()
    yield made
    assert made.faults == []


@pytest.fixture
def runtime(gpu: FakeCuda) -> FakeRuntime:
    return FakeRuntime(gpu)


@pytest.fixture
def bench(gpu: FakeCuda, runtime: FakeRuntime, tmp_path: Path) -> Bench:
    device = OnnxRuntimeCudaDevice(Cuda(gpu), runtime=runtime)
    return Bench(device, device.stream("steps"), write_onnx(tmp_path / "tiny.onnx"))


@pytest.fixture(params=["fake", ON_A_GPU])
def any_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    if request.param == "fake":
        made: Bench = request.getfixturevalue("bench")
        return made
    device = onnxruntime_cuda.open_device(threads=0)
    return Bench(device, device.stream("steps"), write_onnx(tmp_path / "tiny.onnx"))


# What it computes


def test_each_launch_computes_from_new_contents(any_bench: Bench) -> None:
    x, y, call = any_bench.bind()
    assert [any_bench.compute(x, y, call, number) for number in (1, -1, 3, 4, 5)] == [2, 0, 6, 8, 10]


def test_calls_of_one_engine_have_graphs_of_their_own(any_bench: Bench) -> None:
    engine = any_bench.device.load(any_bench.onnx, any_bench.stream)
    whole = any_bench.device.allocate((4 * ALIGNMENT,), np.uint8)
    parts = [whole.view((rows, WIDTH), np.float32, offset=rows * ALIGNMENT) for rows in (1, 2)]
    results = [any_bench.device.allocate(part.shape, np.float32) for part in parts]
    calls = [engine.bind({"x": part, "y": result}) for part, result in zip(parts, results, strict=True)]
    for number in range(4):
        for part, result, call in zip(parts, results, calls, strict=True):
            assert any_bench.compute(part, result, call, number) == 2 * number


def test_a_call_outlives_its_engine_and_buffers(bench: Bench) -> None:
    x, y, call = bench.bind()
    bench.stream.write(x, np.full(x.shape, 3))
    del x
    for _ in range(3):
        call.launch()
    assert bench.stream.read(y).result()[0, 0] == 6


def test_no_launch_waits_for_the_gpu(bench: Bench, gpu: FakeCuda) -> None:
    x, y, call = bench.bind()
    bench.compute(x, y, call, 1)
    bench.stream.write(x, np.full(x.shape, 5))
    with gpu.gate(bench.stream.handle):
        call.launch()
        reading = bench.stream.read(y)
        assert not reading.done()
    assert reading.result()[0, 0] == 10


def test_the_first_launch_is_captured_and_the_later_ones_replayed(bench: Bench, runtime: FakeRuntime) -> None:
    x, y, call = bench.bind()
    for number in range(3):
        bench.compute(x, y, call, number)
    assert runtime.sessions[0].runs == ["regular", "regular", "captured", "replay", "replay", "replay"]


def test_a_session_is_on_its_stream_and_takes_no_more_memory_than_it_needs(bench: Bench, runtime: FakeRuntime) -> None:
    bench.bind()
    assert runtime.sessions[0].options == {
        "device_id": "0",
        "user_compute_stream": str(bench.stream.handle),
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }


def test_memory_is_counted_and_the_device_has_a_name(bench: Bench) -> None:
    buffer = bench.device.allocate((7,), np.float32, purpose="state")
    assert bench.device.memory() == {"state": buffer.nbytes}
    assert (bench.device.name, bench.device.pads) == ("cuda, ONNX Runtime 1.32.0", True)
    bench.device.end_warm_up()


# What it does without graphs


def test_a_graph_that_cannot_be_captured_whole_runs_plainly_and_says_so_once(
    bench: Bench, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.refuses_graphs = True
    engine = bench.device.load(bench.onnx, bench.stream)
    for rows in (1, 2, 3):
        x, y = (bench.device.allocate((rows, WIDTH), np.float32) for _ in range(2))
        call = engine.bind({"x": x, "y": y})
        assert [bench.compute(x, y, call, number) for number in (1, 2, 3)] == [2, 4, 6]
    assert set(runtime.sessions[0].runs) == {"plain"}
    assert caplog.text.count("tiny.onnx runs without a CUDA graph, which makes it slower, for x [1, 4]: ONNX") == 1
    assert caplog.text.count("runs without") == 1
    assert bench.device.uncaptured() == {"tiny": 1}, "the other calls are gone"


@pytest.mark.parametrize("invalidated", [False, True])
def test_a_capture_that_fails_is_tried_once_more_under_another_number(
    bench: Bench, runtime: FakeRuntime, gpu: FakeCuda, caplog: pytest.LogCaptureFixture, *, invalidated: bool
) -> None:
    """Under its first number the session would go on replaying the part that was captured."""
    x, y, call = bench.bind()
    session = runtime.sessions[0]

    def fail() -> None:
        session.breaks = lambda: None
        if invalidated:
            gpu.cudaMalloc(1)
        raise RuntimeError("a node allocates")

    session.breaks = fail
    assert [bench.compute(x, y, call, number) for number in (1, 2, 3)] == [2, 4, 6]
    replays = session.runs.count("replay")
    assert (session.runs.count("plain"), replays) == ((1, 2) if invalidated else (1, 3))
    assert session.runs[-1] == "replay"
    assert bench.device.uncaptured() == {"tiny": 0}
    assert not caplog.text


def test_a_call_that_cannot_be_captured_runs_plainly_and_leaves_the_others_their_graphs(
    bench: Bench, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a node allocates")

    x, y, _call = bench.bind()
    engine, session = bench.device.load(bench.onnx, bench.stream), runtime.sessions[1]
    calls = [engine.bind({"x": x, "y": y}) for _ in range(3)]
    session.breaks = fail
    assert [bench.compute(x, y, one, number) for one in calls[:2] for number in (1, 2, 3, 4)] == [2, 4, 6, 8] * 2
    assert session.runs.count("plain") == 2 * 4
    session.breaks = lambda: None
    assert [bench.compute(x, y, calls[2], number) for number in (1, 2)] == [2, 4]
    assert session.runs[-1] == "replay"
    assert bench.device.uncaptured() == {"tiny": 2}
    assert caplog.text.count("for x [2, 4]: ONNX Runtime failed in a step: a node allocates") == 1
    bench.device.end_warm_up()
    assert "Calls that run without a CUDA graph: 2 of tiny." in caplog.text
    del calls
    assert bench.device.uncaptured() == {"tiny": 0}


def test_nothing_is_freed_while_a_session_captures(bench: Bench, runtime: FakeRuntime, gpu: FakeCuda) -> None:
    """Not even by the threads that drop what an executor which has ended had left."""
    left: list[DeviceBuffer] = []
    owner = Thread(target=lambda: left.append(OnnxRuntimeCudaDevice(Cuda(gpu)).allocate((7,), np.uint8)))
    owner.start()
    owner.join()

    def drop_elsewhere() -> None:
        other = Thread(target=left.clear)
        other.start()
        other.join()
        assert 7 in gpu.live()

    x, y, call = bench.bind()
    runtime.sessions[0].breaks = drop_elsewhere
    assert bench.compute(x, y, call, 1) == 2
    assert 7 not in gpu.live()
    assert runtime.sessions[0].runs[-1] == "replay"


# What is refused


def test_names_that_are_not_the_graphs_are_refused(bench: Bench) -> None:
    x = bench.device.allocate((2, WIDTH), np.float32)
    with pytest.raises(EngineError, match=r"tiny\.onnx takes \['x', 'y'\], was given \['x'\]"):
        bench.device.load(bench.onnx, bench.stream).bind({"x": x})


class Elsewhere:
    """A buffer and a stream of another device."""


def test_what_is_of_another_device_is_refused(bench: Bench) -> None:
    foreign: Any = Elsewhere()
    buffers: dict[str, Buffer] = dict.fromkeys(("x", "y"), foreign)
    with pytest.raises(EngineError, match="works on GPU memory, was given Elsewhere"):
        bench.device.load(bench.onnx, bench.stream).bind(buffers)
    with pytest.raises(EngineError, match="works on CUDA streams, was given Elsewhere"):
        bench.device.load(bench.onnx, foreign)


def test_a_refused_step_is_an_error(bench: Bench, gpu: FakeCuda) -> None:
    x, y, call = bench.bind()
    bench.compute(x, y, call, 1)
    gpu.fail("cudaGraphLaunch", "cudaErrorLaunchOutOfResources")
    with pytest.raises(EngineError, match="ONNX Runtime failed in a step: CUDA failure 701") as raised:
        call.launch()
    assert not isinstance(raised.value, DeviceLost)
    assert bench.compute(x, y, call, 2) == 4


def test_a_lost_device_is_reported(bench: Bench, gpu: FakeCuda) -> None:
    x, y, call = bench.bind()
    bench.compute(x, y, call, 1)
    gpu.lose("cudaErrorLaunchFailure")
    with pytest.raises(DeviceLost, match="CUDA error 719"):
        call.launch()


def test_a_file_that_is_no_graph_is_refused(bench: Bench, runtime: FakeRuntime) -> None:
    runtime.fails = "INVALID_PROTOBUF"
    with pytest.raises(EngineError, match=r"cannot load .*tiny\.onnx: INVALID_PROTOBUF"):
        bench.device.load(bench.onnx, bench.stream)


def test_a_session_that_does_not_fit_reports_what_uses_the_memory(bench: Bench, runtime: FakeRuntime) -> None:
    runtime.fails = "Failed to allocate memory for requested buffer of size 4096"
    kept = bench.device.allocate((2**20,), np.uint8, purpose="state")
    with pytest.raises(EngineError, match=r"does not fit into the GPU's memory: Failed .* state 1\.0 MiB; .* --rows"):
        bench.device.load(bench.onnx, bench.stream)
    assert kept.nbytes == 2**20


@pytest.mark.skipif(not NO_CUDA, reason="this ONNX Runtime has CUDA")
def test_an_onnx_runtime_without_cuda_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"for CPUs only: uninstall the package onnxruntime, then .*\[cuda\]"):
        onnxruntime_cuda.open_device(threads=0)


def test_an_onnx_runtime_whose_graphs_copy_wrong_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(ort, "__version__", "1.30.0")
    with pytest.raises(EngineError, match=r"onnxruntime-gpu 1\.30\.0 is older than 1\.31, .* freed: .*\[cuda\]"):
        onnxruntime_cuda.open_device(threads=0)


@pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
def test_what_is_missing_is_said_in_the_order_in_which_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    with pytest.raises(EngineError, match="No GPU was found"):
        onnxruntime_cuda.open_device(threads=0)
    monkeypatch.setattr(onnxruntime_cuda, "open_cuda", lambda: (None, None))
    monkeypatch.setattr(onnxruntime_cuda, "_LIBRARIES", (Library("libabsent.so.7", "cudart"),))
    with pytest.raises(EngineError, match=r"onnxruntime-gpu 1\.31\.1 needs libabsent\.so\.7, .*\[cuda\]"):
        onnxruntime_cuda.open_device(threads=0)


@pytest.mark.skipif(FOUND.gpu is not None, reason="there is a GPU")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fall_back_to_the_cpu_is_an_error(gpu: FakeCuda, tmp_path: Path) -> None:
    device = OnnxRuntimeCudaDevice(Cuda(gpu))
    with pytest.raises(EngineError, match="could not start its CUDAExecutionProvider, so it would compute on the CPU"):
        device.load(write_onnx(tmp_path / "tiny.onnx"), device.stream("steps"))


# The fake, held against the real package


def test_the_fake_binds_as_the_real_one_does(bench: Bench) -> None:
    real = ort.InferenceSession(bench.onnx)
    binding, array = real.io_binding(), np.ones((2, WIDTH), np.float32)
    out = np.zeros_like(array)
    binding.bind_input("x", "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
    real.run_with_iobinding(binding, onnxruntime_cuda._run_options(1))
    np.testing.assert_array_equal(out, np.full((2, WIDTH), 2))
