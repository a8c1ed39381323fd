"""Compiling a distilled decoder as the VAE's: the same shapes and precisions, for GPUs and in INT8."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.accuracy import tolerance, worst_difference
from engines.backends.registry import SPECS
from engines.build.compile import engine_precisions
from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.build.profiles import shapes
from engines.build.quantize import quantize
from engines.build.served_shapes import pool_sizes
from engines.build.trajectory import CALIBRATED, decode_inputs
from engines.contract import ALL_GRAPHS, DECODERS, LANES, Array
from engines.manifest import Manifest
from tests.support.loaded import Loaded


@pytest.fixture
def copied(fast_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fast_bundle, tmp_path / "copy"))


def exported(bundle: Path) -> Path:
    return bundle / Manifest.read(bundle).graphs["decode_fast"].onnx["fp32"].files[0].path


def test_both_have_the_same_shapes_and_precisions(fast_bundle: Path) -> None:
    manifest = Manifest.read(fast_bundle)
    assert shapes(manifest, "decode_fast") == shapes(manifest, "decode")
    assert pool_sizes(manifest, "decode_fast") == pool_sizes(manifest, "decode")
    assert set(DECODERS.values()) < set(CALIBRATED)
    for backend, spec in SPECS.items():
        for precision in spec.precisions:
            chosen = engine_precisions(backend, precision, graphs=ALL_GRAPHS)
            assert chosen["decode_fast"] == chosen["decode"]


def test_onnxruntime_on_gpus_computes_the_same(copied: Path) -> None:
    graph = exported(copied)
    counts = rewrite(graph, graph.with_suffix(".cuda.onnx"))
    assert counts.convolutions[0] == counts.convolutions[1] > 0
    manifest = Manifest.read(copied)
    assert check_same("decode_fast", manifest, graph, graph.with_suffix(".cuda.onnx")).largest < 1e-2


def test_int8_decodes_nearly_the_same(copied: Path, tmp_path: Path) -> None:
    inputs = decode_inputs(np.random.default_rng(0).standard_normal((2, LANES, 4, 8, 8), np.float32))
    like: dict[str, Array] = {"images": np.empty((1, 16, 16, 3), np.uint8), "is_finite": np.empty(1, np.float32)}
    exact = Loaded("openvino", exported(copied))(inputs, like)
    graph, _weights = quantize(exported(copied), tmp_path / "int8", [inputs])
    outputs = Manifest.read(copied).graphs["decode_fast"].outputs
    assert worst_difference(Loaded("openvino", graph)(inputs, like), exact).largest < tolerance("int8", outputs)
