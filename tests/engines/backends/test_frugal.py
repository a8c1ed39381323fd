"""Where it is frugal, ONNX Runtime leaves weights in their file, and widens one layer's at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends.host import HostBuffer
from engines.backends.onnxruntime import open_device

LAYERS, WIDTH = 20, 1536
WIDE = LAYERS * WIDTH**2 * 4  # bytes of all weights in FP32


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Products with matrices that are stored in FP16, all of them cast before the first is used."""
    stored = np.full((WIDTH, WIDTH), 1 / WIDTH, np.float16)
    weights = [numpy_helper.from_array(stored, f"w{layer}") for layer in range(LAYERS)]
    casts = [helper.make_node("Cast", [f"w{one}"], [f"c{one}"], to=TensorProto.FLOAT) for one in range(LAYERS)]
    products = [helper.make_node("MatMul", [f"x{one}", f"c{one}"], [f"x{one + 1}"]) for one in range(LAYERS)]
    ports = [helper.make_tensor_value_info(f"x{one}", TensorProto.FLOAT, [1, WIDTH]) for one in (0, LAYERS)]
    made = helper.make_graph([*casts, *products], "g", ports[:1], ports[1:], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.weights")
    return tmp_path / "g.onnx"


def anonymous() -> int:
    """Private memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_weights_stay_in_their_file(graph: Path) -> None:
    before = anonymous()
    device = open_device(threads=1, is_frugal=True)
    x, y = HostBuffer(np.ones((1, WIDTH), np.float32)), device.allocate((1, WIDTH), np.float32)
    engine = device.load(graph, device.stream("test"))
    engine.bind({"x0": x, f"x{LAYERS}": y}).launch()
    assert np.allclose(y.array, 1, rtol=1e-2)
    assert anonymous() - before < WIDE / 4
