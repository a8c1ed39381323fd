"""Compiling the graphs of models that inpaint: nine channels into the first convolution, and a mask."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.build.profiles import shapes
from engines.build.trt.parent import build_engine
from engines.contract import GraphName
from engines.manifest import Manifest
from engines.progress import NullProgress

CLOSE = 1e-5  # of two orders of the same sums in FP32, relative to the range


def exported(bundle: Path, name: GraphName) -> Path:
    return bundle / Manifest.read(bundle).graphs[name].onnx["fp32"].files[0].path


@pytest.mark.parametrize("name", ["denoise", "denoise_shallow", "encode_image"])
def test_onnxruntime_on_gpus_computes_the_same(inpainting_bundle: Path, tmp_path: Path, name: GraphName) -> None:
    """Channels last from the first convolution on; the mask adds no transposition."""
    bundle = Path(shutil.copytree(inpainting_bundle, tmp_path / "copy"))
    graph = exported(bundle, name)
    counts = rewrite(graph, graph.with_suffix(".cuda.onnx"))
    assert counts.convolutions[0] == counts.convolutions[1] > 0
    assert counts.transposes == (1 if name == "encode_image" else 3)
    manifest = Manifest.read(bundle)
    assert check_same(name, manifest, graph, graph.with_suffix(".cuda.onnx")).largest < CLOSE


@pytest.mark.parametrize("name", ["denoise_shallow", "encode_image"])
def test_tensorrt_for_rtx_builds_engines(inpainting_bundle: Path, tmp_path: Path, name: GraphName) -> None:
    """Of the graphs with the first convolution and the mask; the whole UNet takes several times as long."""
    manifest = Manifest.read(inpainting_bundle)
    profile = shapes(manifest, name)[0]
    ranges = [{spec.name: profile.of(spec) for spec in manifest.graphs[name].inputs}]
    made = tmp_path / "made.engine"
    build_engine("tensorrt_rtx", exported(inpainting_bundle, name), made, ranges, progress=NullProgress())
    assert made.stat().st_size > 0
