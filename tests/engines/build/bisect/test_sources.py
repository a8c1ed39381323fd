"""Which ONNX graph an engine computes, and which exported one it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.build.bisect.run import sources
from engines.errors import EngineError
from engines.manifest import Compiled, Manifest, Precision

DEMO = Path("engines/demo")


@pytest.fixture
def manifest() -> Manifest:
    """With graphs in FP16, too."""
    manifest = Manifest.read(DEMO)
    graph = manifest.graphs["denoise"]
    exact = graph.onnx["fp32"]
    half = exact.model_copy(update={"files": (exact.files[0].model_copy(update={"path": "onnx/denoise.fp16.onnx"}),)})
    typed = graph.model_copy(update={"onnx": {"fp32": exact, "fp16": half}})
    return manifest.model_copy(update={"graphs": {**manifest.graphs, "denoise": typed}})


def engine(manifest: Manifest, precision: Precision, path: str) -> Compiled:
    file = manifest.graphs["denoise"].onnx["fp32"].files[0].model_copy(update={"path": path})
    return Compiled(files=(file,), precision=precision, key="k", seconds=0, memory=0)


@pytest.mark.parametrize(
    ("backend", "precision", "path", "expected"),
    [
        ("onnxruntime", "fp32", "onnx/denoise.onnx", ("onnx/denoise.onnx", "onnx/denoise.onnx")),
        ("tensorrt", "fp16", "engines/denoise.engine", ("onnx/denoise.fp16.onnx", "onnx/denoise.fp16.onnx")),
        ("tensorrt_rtx", "fp32", "engines/denoise.engine", ("onnx/denoise.onnx", "onnx/denoise.onnx")),
        ("tensorrt", "fp8", "engines/denoise.engine", ("onnx/denoise.fp8.onnx", "onnx/denoise.fp16.onnx")),
        ("tensorrt", "int8", "engines/denoise.engine", ("onnx/denoise.int8.onnx", "onnx/denoise.fp16.onnx")),
        ("onnxruntime_cuda", "fp16", "onnx/denoise.made.onnx", ("onnx/denoise.made.onnx", "onnx/denoise.fp16.onnx")),
    ],
)
def test_each_backend_has_its_graph(
    manifest: Manifest, backend: str, precision: Precision, path: str, expected: tuple[str, str]
) -> None:
    assert sources(manifest, backend, "denoise", engine(manifest, precision, path)) == expected


def test_what_is_no_onnx_graph_is_said_so(manifest: Manifest) -> None:
    with pytest.raises(EngineError, match=r"denoise\.xml is no ONNX graph"):
        sources(manifest, "openvino", "denoise", engine(manifest, "int8", "engines/openvino/denoise.xml"))
