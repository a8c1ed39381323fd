"""Graphs that apply LoRAs on ONNX Runtime's CUDA execution provider: captured as the plain ones, with more kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.build.onnxruntime_cuda.make import SUFFIX
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.contract import LORA_GRAPHS, GraphName
from engines.manifest import Manifest
from tests.stub_cuda.report import Report

pytestmark = pytest.mark.stub_cuda

KERNELS_PER_LAYER = 10  # at most, in FP32, where factors are cast; 9.3 were found


@pytest.fixture(scope="module")
def fused(lora_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the graphs as they are built for the backend."""
    folder = Path(shutil.copytree(lora_bundle / "onnx", tmp_path_factory.mktemp("lora") / "onnx"))
    for name in (*LORA_GRAPHS, *LORA_GRAPHS.values()):
        rewrite(folder / f"{name}.onnx", folder / f"{name}{SUFFIX}")
    return folder


@pytest.mark.parametrize(("name", "variant"), LORA_GRAPHS.items())
def test_a_variant_is_captured_and_adds_few_kernels_a_layer(
    runs: Callable[..., Report], fused: Path, lora_bundle: Path, name: GraphName, variant: GraphName
) -> None:
    plain, made = (runs(graph=str(fused / f"{one}{SUFFIX}")) for one in (name, variant))
    assert made.nodes_on_cpu() == set()
    assert made.result["copies"] == 0
    assert (len(made.captured), made.result["uncaptured"]) == (made.result["calls"], 0)
    assert made.faults() == []
    assert made.replayed() == {"replay": made.result["calls"]}
    part = "text_encoder" if name == "encode_prompt" else "unet"
    layers = {layer.name for layer in Manifest.read(lora_bundle).lora_layers if layer.part == part}
    if name != "denoise_shallow":  # which computes a part of the layers
        assert made.kernels - plain.kernels <= KERNELS_PER_LAYER * len(layers)
