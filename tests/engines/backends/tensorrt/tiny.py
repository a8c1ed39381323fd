"""A small graph with two profiles, compiled by the real builders, and a device that runs it."""

from __future__ import annotations

import multiprocessing
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

from engines.backends.cuda import CudaStream, probe
from engines.backends.device import Buffer
from engines.backends.tensorrt.compatibility import supported_capabilities
from engines.backends.tensorrt.device import TensorRtDevice
from engines.backends.tensorrt.engine import TensorRtCall
from engines.contract import Array
from tests import ROOT
from tests.engines.backends.fake_tensorrt import Profile

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


class Elsewhere:
    """A buffer and a stream of another device."""

    shape = (2, WIDTH)
