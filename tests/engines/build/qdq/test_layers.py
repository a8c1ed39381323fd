"""The layers that compute in eight bits are those that NVIDIA's recipes for Stable Diffusion quantize."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from engines.build.qdq.layers import quantizable, save_alone
from engines.contract import build_inputs, inputs_of, random_values
from engines.demo import BUNDLE as DEMO
from engines.manifest import Manifest
from tests.support.loaded import Loaded

GRAPH = DEMO / "onnx" / "denoise_shallow.onnx"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """The demo's UNet without the casts that its weights are behind."""
    path = tmp_path_factory.mktemp("alone") / "denoise.onnx"
    save_alone(ir.load(DEMO / "onnx" / "denoise.onnx"), path)
    return ir.load(path)


def test_convolutions_and_linear_layers_between_the_ends(unet: ir.Model) -> None:
    """Neither the timestep's layers, nor what reads or writes latents, nor shortcuts, nor a step's own arithmetic."""
    names = set(quantizable(unet.graph))
    layers = [node for node in unet.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    chosen = Counter(node.op_type for node in layers if node.name in names)
    assert chosen == {"Conv": 33, "MatMul": 70}
    kept = {str(node.inputs[1].name) for node in layers if node.name not in names and node.inputs[1]}
    weights = [name.removeprefix("unet.") for name in kept if "weight" in name]
    assert Counter(name.split(".")[-2] for name in weights) == {
        "linear_1": 1,
        "linear_2": 1,
        "time_emb_proj": 11,
        "conv_in": 1,
        "conv_out": 1,
        "conv_shortcut": 8,
        "proj_out": 7,
    }
    assert {"guidance", "coef"} <= {str(node.inputs[0].name) for node in layers if node.inputs[0]}


def test_a_graph_of_its_own_computes_the_same(tmp_path: Path) -> None:
    """Its weights are those behind the casts, in the type that layers read, and its folder holds nothing else."""
    alone = tmp_path / "denoise_shallow.onnx"
    save_alone(ir.load(GRAPH), alone)
    assert {path.name for path in tmp_path.iterdir()} == {"denoise_shallow.onnx", "denoise_shallow.weights"}
    weights = ir.load(alone).graph.initializers
    assert weights["unet.conv_in.weight"].dtype == ir.DataType.FLOAT
    manifest = Manifest.load(DEMO)
    sizes = {**manifest.dims(manifest.resolutions[0]), "S": 3, "C": 2, "B": 1, "R": 2, "P": 2, "L": 1}
    inputs = build_inputs(inputs_of("denoise_shallow"), sizes, make=random_values(np.random.default_rng(0)))
    empty = {"state_next": np.empty_like(inputs["state"]), "guidance_effect": np.empty(1, np.float32)}
    expected, actual = (Loaded("onnxruntime", path)(inputs, empty)["state_next"] for path in (GRAPH, alone))
    np.testing.assert_array_equal(actual, expected)
