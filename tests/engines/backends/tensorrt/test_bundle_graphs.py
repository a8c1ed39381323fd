"""The graphs of the demo bundle, over the fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from engines.backends.device import Buffer
from engines.build.profiles import shapes
from engines.contract import GRAPHS, Array, GraphName
from engines.manifest import Manifest
from tests.engines.backends.fake_cuda import FakeCuda
from tests.engines.backends.fake_tensorrt import fake_device, write_bundle_engine
from tests.engines.backends.tensorrt.tiny import DEMO


@pytest.mark.parametrize("graph", GRAPHS)
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
