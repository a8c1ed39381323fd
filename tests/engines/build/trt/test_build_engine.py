"""Real TensorRT-RTX builds of a small graph, which need no GPU; and every way in which a build can end badly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends.registry import install_command
from engines.build.trt import child as building
from engines.build.trt import parent
from engines.build.trt.disk import write_engine
from engines.build.trt.errors import BuildError, GraphRefused, NotWritten, OutOfMemory, Unavailable
from engines.build.trt.layers import inspected_layers, summarize
from engines.build.trt.parent import (
    EngineReport,
    Ranges,
    build_engine,
)
from engines.errors import EngineError
from engines.progress import NullProgress
from tests import ROOT

RTX = "tensorrt_rtx"
CHANNELS, HEADS = 320, 8
SIDE = 8


class Drawn:
    """A graph under construction: nodes and weights as torch's exporter writes them."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._dice = np.random.default_rng(0)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] | None = None) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype or self.dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self._dice.standard_normal(shape) * 0.05)

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.constant(shape, np.int64))

    def conv(self, x: str, channels: int) -> str:
        return self.node("Conv", x, self.weight(CHANNELS, channels, 3, 3), self.weight(CHANNELS), pads=[1, 1, 1, 1])

    def group_norm(self, x: str, groups: int = 32) -> str:
        ones, zeros = self.constant(np.ones(groups)), self.constant(np.zeros(groups))
        normed = self.node("InstanceNormalization", self.reshape(x, 0, groups, -1), ones, zeros, epsilon=1e-5)
        back = self.node("Reshape", normed, self.node("Shape", x))
        return self.node("Add", self.node("Mul", back, self.weight(CHANNELS, 1, 1)), self.weight(CHANNELS, 1, 1))

    def silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def attention(self, x: str) -> str:
        """Self-attention of [R, tokens, CHANNELS], behind a LayerNorm."""
        scale = self.constant((CHANNELS / HEADS) ** -0.25)
        normed = self.node("LayerNormalization", x, self.weight(CHANNELS), self.weight(CHANNELS), axis=-1)
        q, k, v = (self._heads(normed, order) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        scores = self.node("MatMul", self.node("Mul", q, scale), self.node("Mul", k, scale))
        seen = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        return self.node("Add", self.reshape(self.node("Transpose", seen, perm=[0, 2, 1, 3]), 0, -1, CHANNELS), x)

    def _heads(self, x: str, order: list[int]) -> str:
        projected = self.node("MatMul", x, self.weight(CHANNELS, CHANNELS))
        return self.node("Transpose", self.reshape(projected, 0, -1, HEADS, CHANNELS // HEADS), perm=order)


def draw(path: Path, *, dtype: type[np.generic] = np.float16, side: int | str = SIDE) -> Path:
    """One block of a UNet: two GroupNorms, one of them with a SiLU behind it, and an attention."""
    graph = Drawn(dtype)
    x = graph.conv(graph.silu(graph.group_norm(graph.conv("x", 4))), CHANNELS)
    last = graph.node("Transpose", graph.group_norm(x), perm=[0, 2, 3, 1])
    output = graph.attention(graph.reshape(last, 0, -1, CHANNELS))
    return save(path, graph, {"x": ["R", 4, side, side]}, {output: ["R", "tokens", CHANNELS]})


def save(path: Path, graph: Drawn, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> Path:
    kind = TensorProto.FLOAT16 if graph.dtype is np.float16 else TensorProto.FLOAT
    ins, outs = (
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in ports.items()]
        for ports in (inputs, outputs)
    )
    model = helper.make_model(
        helper.make_graph(graph.nodes, "g", ins, outs, graph.weights), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path


def rows(most: int, least_side: int = SIDE, most_side: int = SIDE) -> Ranges:
    largest = (most, 4, most_side, most_side)
    return {"x": ((1, 4, least_side, least_side), largest, largest)}


MANY = [rows(most) for most in range(1, 13)]  # whose build takes long enough to be interrupted


@dataclass
class Stage:
    name: str
    heard: list[tuple[float, float]] = field(default_factory=list)
    ended: bool = False

    def update(self, done: float, total: float) -> None:
        self.heard.append((done, total))


class Recorder:
    """Progress that remembers every stage, fails where they do not nest, and may be told to act when one begins."""

    def __init__(self, act: Callable[[str], object] = lambda name: name) -> None:
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self._act = act
        self._open: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        stage = Stage(name)
        self.stages.append(stage)
        self._open.append(stage)
        try:
            self._act(name)
            yield stage
        finally:
            assert self._open.pop() is stage
            stage.ended = True

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("graph") / "block.onnx")


@dataclass
class Built:
    report: EngineReport
    progress: Recorder
    out: Path


@pytest.fixture(scope="module")
def built(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The graph as an engine with two profiles, in the place of an older one."""
    out, progress = tmp_path_factory.mktemp("engines") / "block.engine", Recorder()
    out.write_bytes(b"an older engine")
    return Built(build_engine(RTX, graph, out, [rows(2), rows(4)], progress=progress), progress, out)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the processes that the test starts."""
    started: list[int] = []
    start = subprocess.Popen.__init__

    def started_one(self: subprocess.Popen[Any], *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        started.append(self.pid)

    monkeypatch.setattr(subprocess.Popen, "__init__", started_one)
    return started


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and whose parent has not asked for its status does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, code: str) -> None:
    """Put another module in TensorRT's place."""
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


# What comes out.


def test_every_attention_and_group_norm_is_one_kernel_in_every_profile(built: Built) -> None:
    layers = built.report.layers
    assert layers is not None
    assert (layers["attentions"], layers["fused_attentions"]) == (1, 1)
    assert (layers["group_norms"], layers["fused_group_norms"]) == (2, 2)  # and the LayerNorm is not one
    assert 5 < layers["total"] < 40  # one profile's, not both's
    assert layers["precisions"]["Half"] > layers["precisions"].get("Float", 0)
    assert sum(layers["precisions"].values()) <= layers["total"]


def test_the_engine_takes_the_place_of_the_older_one_and_nothing_else_is_left(built: Built) -> None:
    content = built.out.read_bytes()
    assert 2 * 4 * CHANNELS**2 < len(content) < 20_000_000  # its weights, at two bytes each, at least
    assert hashlib.sha256(content).digest() != hashlib.sha256(b"an older engine").digest()
    assert list(built.out.parent.iterdir()) == [built.out]


def test_the_report_tells_what_building_took(built: Built) -> None:
    assert 0 < built.report.seconds < 60
    assert 50e6 < built.report.memory < 2e9  # the child's own: this process has torch in it
    assert built.report.activations is None or all(built.report.activations)
    assert built.progress.notes == []


def test_tensorrts_phases_are_heard_to_their_end(built: Built) -> None:
    stages = built.progress.stages
    names = [stage.name for stage in stages]
    assert (names[0], names[1], names[-1]) == ("Reading the graph", "Building engine", "Writing the engine")
    assert all(stage.ended for stage in stages)
    assert max(len(stage.heard) for stage in stages) > 20
    for stage in stages:
        done = [done for done, _ in stage.heard]
        assert done == sorted(done)
        assert all(0 <= done <= total for done, total in stage.heard)


def test_attention_in_fp32_is_told_not_to_be_fused(tmp_path: Path) -> None:
    path = draw(tmp_path / "fp32.onnx", dtype=np.float32)
    layers = build_engine(RTX, path, tmp_path / "fp32.engine", [rows(2)], progress=NullProgress()).layers
    assert layers is not None
    assert (layers["attentions"], layers["fused_attentions"]) == (1, 0)
    assert "Half" not in layers["precisions"]


def test_the_profile_that_came_out_worst_is_told(tmp_path: Path) -> None:
    path = draw(tmp_path / "any_size.onnx", side="side")
    profiles = [rows(2), rows(2, SIDE, 2 * SIDE)]
    layers = build_engine(RTX, path, tmp_path / "any_size.engine", profiles, progress=NullProgress()).layers
    assert layers is not None
    assert (layers["group_norms"], layers["fused_group_norms"]) == (2, 0)


def test_a_build_does_not_care_where_it_is_started(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engines").mkdir()
    for shadow in ("engines/__init__.py", "json.py"):
        (tmp_path / shadow).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    build_engine(RTX, graph, Path("here.engine"), [rows(1)], progress=NullProgress())
    assert (tmp_path / "here.engine").stat().st_size > 1_000_000


def test_the_engine_inspector_tells_the_same() -> None:
    """Of what TensorRT prints only where there is a GPU, in the two spellings that its versions have."""

    def layer(name: str, reads: str, writes: dict[str, str]) -> dict[str, Any]:
        return {"Name": name, "LayerType": "kgen", "Inputs": [{"Name": reads}], "Outputs": [{"Name": "y", **writes}]}

    half, single = {"Datatype": "Half"}, {"Format/Datatype": "Float"}
    first = [layer("__myl_SiluGnor_myl0_1", "x", half), layer("_gemm_mha_v2_myl0_2", "t", half)]
    second = [layer("__myl_Move_myl1_0", "x [profile 1]", single), layer("_gemm_mha_v2_myl1_1", "t", half)]
    table = inspected_layers(json.dumps({"Layers": [*first, *second, "named only_myl1_2"]}))
    assert summarize(table, {"attentions": 1, "group_norms": 1}) == {
        "total": 3,
        "attentions": 1,
        "fused_attentions": 1,
        "group_norms": 1,
        "fused_group_norms": 0,
        "precisions": {"Float": 1, "Half": 1},
    }


# Cancelling.


def test_an_interrupt_ends_the_child_and_leaves_the_older_engine(graph: Path, tmp_path: Path, child: list[int]) -> None:
    def interrupt(name: str) -> None:
        if name == "Computing profile costs":
            raise KeyboardInterrupt

    out, progress = tmp_path / "block.engine", Recorder(interrupt)
    out.write_bytes(b"an older engine")
    with pytest.raises(KeyboardInterrupt):
        build_engine(RTX, graph, out, MANY, progress=progress)
    assert all(stage.ended for stage in progress.stages)
    assert out.read_bytes() == b"an older engine"
    assert list(tmp_path.iterdir()) == [out]
    assert not alive(child[0])


def test_a_build_that_does_not_look_up_is_killed(
    graph: Path, tmp_path: Path, child: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, RTX, PRETENDED + "    def create_network(self, flags): time.sleep(60)\n")
    monkeypatch.setattr(parent, "_GRACE", 0.2)

    class Interrupting(NullProgress):
        def note(self, text: str) -> None:
            assert text == "ready"
            raise KeyboardInterrupt

    out = tmp_path / "block.engine"
    with pytest.raises(KeyboardInterrupt):
        build_engine(RTX, graph, out, MANY, progress=Interrupting())
    assert not alive(child[0])
    assert not list(tmp_path.glob("*.engine*"))


def test_a_build_that_does_not_look_up_ends_itself_when_nobody_listens(
    graph: Path, tmp_path: Path, child: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, RTX, PRETENDED + "    def create_network(self, flags): time.sleep(60)\n")
    out, beside = tmp_path / "it.engine", tmp_path / "beside"
    job = {"module": RTX, "onnx": str(graph), "out": str(out), "beside": str(beside), "profiles": []}
    with TemporaryFile() as stderr, parent._running(job, stderr) as alone:
        said = next(message for message in parent._heard(alone) if "note" in message)
        assert said == {"note": "ready"}
        assert beside.exists()
        assert alone.stdout
        alone.stdout.close()
        assert soon(lambda: not alive(child[0]))
        assert alone.wait() == 1
    assert not beside.exists()


CALLER = """
import subprocess, sys, time
from pathlib import Path
from engines.progress import NullProgress
from engines.build.trt.parent import build_engine

class Telling(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)

class Progress(NullProgress):
    def stage(self, name):
        if name == "Computing profile costs":
            print("building", flush=True)
        return super().stage(name)

subprocess.Popen = Telling
shape = lambda rows: (rows, 4, 8, 8)
profiles = [{"x": (shape(1), shape(rows), shape(rows))} for rows in range(1, 13)]
build_engine("tensorrt_rtx", Path(sys.argv[1]), Path(sys.argv[2]), profiles, progress=Progress())
"""


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGKILL, False)]
)
def test_nothing_outlives_a_caller_that_is_interrupted_or_killed(
    graph: Path, tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    here = ROOT
    caller = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-c", CALLER, graph, tmp_path / "block.engine"],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with caller:
        assert caller.stdout
        builder = int(caller.stdout.readline())
        assert caller.stdout.readline() == "building\n"
        os.killpg(caller.pid, number) if whole_group else caller.send_signal(number)
        _, said = caller.communicate(timeout=20)
    assert caller.returncode == -number
    assert "KeyboardInterrupt" in said or number is signal.SIGKILL
    assert soon(lambda: not alive(builder))
    assert list(tmp_path.iterdir()) == []


# Refusals.


def refused(kind: type[BuildError], graph: Path, out: Path, module: str = RTX, profile: Ranges | None = None) -> str:
    """What a build that must fail says; it leaves nothing behind."""
    with pytest.raises(EngineError) as failure:
        build_engine(module, graph, out, [profile or rows(1)], progress=NullProgress())
    assert type(failure.value) is kind
    if out.parent.is_dir():
        assert not [path for path in out.parent.iterdir() if out.name in path.name]
    return str(failure.value)


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    graph = Drawn(np.float32)
    output = graph.node("Relu", graph.node("Bernoulli", "x"))
    path = save(tmp_path / "odd.onnx", graph, {"x": ["R", 4, SIDE, SIDE]}, {output: ["R", 4, SIDE, SIDE]})
    message = refused(GraphRefused, path, tmp_path / "odd.engine")
    assert "node 'node_Bernoulli_0' (Bernoulli): not supported (UNSUPPORTED_NODE)" in message
    assert "Export the graph again" in message


@pytest.mark.parametrize("content", [None, b"not a graph" * 40])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if content:
        path.write_bytes(content)
    assert str(path) in refused(GraphRefused, path, tmp_path / "it.engine")


def test_profiles_must_be_of_the_graphs_inputs(graph: Path, tmp_path: Path) -> None:
    message = refused(GraphRefused, graph, tmp_path / "it.engine", profile={"y": rows(1)["x"]})
    assert "inputs are ['x'], the profile's ['y']" in message


@pytest.mark.parametrize(
    ("shapes", "reported"),
    [
        (((4, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 8)), "MIN<=OPT<=MAX"),
        (((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), "Dimension mismatch for tensor x"),
    ],
)
def test_shapes_that_cannot_be_are_told_in_tensorrts_words(
    graph: Path, tmp_path: Path, shapes: tuple[tuple[int, ...], ...], reported: str
) -> None:
    least, best, largest = shapes
    with pytest.raises(BuildError, match=reported) as failure:
        build_engine(RTX, graph, tmp_path / "it.engine", [{"x": (least, best, largest)}], progress=NullProgress())
    assert "cudaError" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_module_is_refused_before_anything_is_started(graph: Path, tmp_path: Path, child: list[int]) -> None:
    assert "choose one of tensorrt, tensorrt_rtx" in refused(Unavailable, graph, tmp_path / "it.engine", "tensorflow")
    assert child == []


@pytest.mark.parametrize(("module", "extra"), [("tensorrt", "cuda"), ("tensorrt_rtx", "rtx")])
def test_a_missing_package_is_named_with_what_installs_it(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    pretend(monkeypatch, tmp_path, module, f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    assert install_command(extra) in refused(Unavailable, graph, tmp_path / "it.engine", module)


def test_a_package_without_its_libraries_is_to_be_installed_again(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "tensorrt", "raise OSError('libnvinfer.so.11: cannot open shared object file')")
    message = refused(Unavailable, graph, tmp_path / "it.engine", "tensorrt")
    assert "libnvinfer.so.11" in message
    assert "--force-reinstall" in message


def test_full_tensorrt_is_not_started_without_a_gpu(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, "tensorrt", "def Builder(logger): raise SystemExit('started all the same')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refused(Unavailable, graph, tmp_path / "it.engine", "tensorrt")
    assert "there is none here (cudaError" in message
    assert "tensorrt_rtx, which needs no GPU" in message


# What goes wrong on the way. TensorRT's part is played by a module as long as it must be.

PRETENDED = """
import time

class ComputeCapability: pass
class IProgressMonitor: pass
class ILogger:
    class Severity(int):
        ERROR, WARNING = 1, 2
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1
class Builder:
    def __init__(self, logger):
        logger.log(ILogger.Severity(2), "ready")
"""


@pytest.mark.parametrize(
    ("fate", "kind", "reported"),
    [
        ("raise TypeError('factory function returned nullptr')", Unavailable, "does not start here"),
        ("raise MemoryError", OutOfMemory, r"ran out of memory at [\d.]+ MB: use fewer --resolution, --rows"),
        ("raise ValueError('a new fault')", BuildError, "exit status 1: .*ValueError: a new fault"),
        ("print('from C', flush=True); import os; os._exit(3)", BuildError, "exit status 3: from C. Build again"),
    ],
)
def test_what_happens_to_the_child_is_told(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str, kind: type[BuildError], reported: str
) -> None:
    pretend(monkeypatch, tmp_path, RTX, f"{PRETENDED}        {fate}\n")
    with pytest.raises(kind, match=reported):
        build_engine(RTX, graph, tmp_path / "it.engine", [rows(1)], progress=NullProgress())
    assert not list(tmp_path.glob("*.engine*"))


@pytest.mark.parametrize(
    "words", ["Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "std::bad_alloc", "out of memory"]
)
def test_tensorrts_words_for_too_little_memory_are_known(words: str) -> None:
    assert building._OUT_OF_MEMORY.search(f"[virtualMemoryBuffer.cpp::resizePhysical::172] {words}")


@pytest.mark.parametrize(
    ("number", "kind", "reported"),
    [
        (signal.SIGKILL, OutOfMemory, r"killed when it took \d+\.\d [MG]B of memory.*use fewer --resolution"),
        (signal.SIGSEGV, BuildError, "was ended by SIGSEGV: it said nothing. Build again"),
        (signal.SIGTERM, BuildError, "stopped by a signal: start it again"),
    ],
)
def test_a_child_that_is_struck_down_leaves_nothing(
    graph: Path, tmp_path: Path, child: list[int], number: signal.Signals, kind: type[BuildError], reported: str
) -> None:
    def strike(name: str) -> None:
        if name == "Computing profile costs":
            os.kill(child[0], number)

    with pytest.raises(kind, match=reported):
        build_engine(RTX, graph, tmp_path / "it.engine", MANY, progress=Recorder(strike))
    assert list(tmp_path.iterdir()) == []
    assert not alive(child[0])


def test_a_folder_that_cannot_be_written_to_is_told_before_the_build(graph: Path, tmp_path: Path) -> None:
    progress = Recorder()
    with pytest.raises(NotWritten, match=r"No such file or directory\. Choose another --out"):
        build_engine(RTX, graph, tmp_path / "nowhere" / "it.engine", [rows(1)], progress=progress)
    assert progress.stages == []


def test_a_file_that_may_not_grow_leaves_the_older_engine(graph: Path, tmp_path: Path, child: list[int]) -> None:
    out = tmp_path / "it.engine"
    out.write_bytes(b"an older engine")

    def limit(name: str) -> None:
        if name == "Building engine":
            resource.prlimit(child[0], resource.RLIMIT_FSIZE, (100_000, 100_000))

    with pytest.raises(NotWritten, match=r"no room for .*it takes \d+\.\d MB, .* are free. Make room"):
        build_engine(RTX, graph, out, [rows(1)], progress=Recorder(limit))
    assert out.read_bytes() == b"an older engine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten, match=r"\(No space left on device\): it takes 3.0 MB"):
        write_engine(bytes(3_000_000), tmp_path / "it.engine", tmp_path / "beside")
    assert not (tmp_path / "it.engine").exists()
