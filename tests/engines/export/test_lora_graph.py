"""Graphs that apply LoRAs: every row computes what the model computes with that row's LoRAs in its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from engines.contract import GUIDANCE_EFFECT, LORA_GRAPHS, OUTPUTS, Array, GraphName, plain
from engines.manifest import Manifest
from tests.support.fused import (
    ROWS,
    WITHOUT,
    by_fused_weights,
    fused_difference,
    lora_inputs,
    outputs_of,
)

VARIANTS = tuple(LORA_GRAPHS.values())


@pytest.fixture(scope="module")
def lora_manifest(lora_bundle: Path) -> Manifest:
    return Manifest.load(lora_bundle)


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> dict[str, Any]:
    return {
        "unet": UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval(),
        "text_encoder": CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval(),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_each_row_is_the_models_with_its_loras_in_the_weights(
    lora_manifest: Manifest, lora_bundle: Path, parts: Mapping[str, Any], name: GraphName
) -> None:
    assert fused_difference(name, lora_manifest, lora_bundle, parts) < 1e-3  # features are in FP16
    inputs = lora_inputs(name, lora_manifest)
    wanted = by_fused_weights(name, lora_manifest, parts, inputs)
    without = {**inputs, "lora_weight": np.zeros_like(inputs["lora_weight"])}
    changed = by_fused_weights(name, lora_manifest, parts, without)
    for output in wanted.keys() - {GUIDANCE_EFFECT.name}:  # no image has a negative row
        apart = np.abs(wanted[output][:ROWS].astype(np.float32) - changed[output][:ROWS].astype(np.float32))
        assert (apart.reshape(ROWS, -1).max(1) > 0.05).tolist() == [True, False, True, True], "they change the rest"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_without_loras_is_the_plain_graphs(lora_manifest: Manifest, lora_bundle: Path, name: GraphName) -> None:
    """Among rows that have some, and though its indices name ranks of theirs."""
    inputs = lora_inputs(name, lora_manifest)
    base = plain(name)
    given = {port.name: inputs[port.name] for port in lora_manifest.graphs[base].inputs}
    like = _like(lora_manifest, name)
    without = outputs_of(base, lora_manifest, lora_bundle, given, like)
    updated = outputs_of(name, lora_manifest, lora_bundle, inputs, like)
    for output in like:
        np.testing.assert_allclose(updated[output][WITHOUT], without[output][WITHOUT], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_not_finite_stays_in_its_row(lora_manifest: Manifest, lora_bundle: Path, name: GraphName) -> None:
    inputs = lora_inputs(name, lora_manifest)
    like = _like(lora_manifest, name)
    before = outputs_of(name, lora_manifest, lora_bundle, inputs, like)
    pool, alone = inputs["lora_pool"].copy(), inputs["row_lora"].copy()
    pool[8] = np.inf
    alone[3], alone[:3] = 8, np.where(alone[:3] == 8, 0, alone[:3])
    after = outputs_of(name, lora_manifest, lora_bundle, {**inputs, "lora_pool": pool, "row_lora": alone}, like)
    for output in like:
        np.testing.assert_array_equal(after[output][:3], before[output][:3])
    assert not all(np.isfinite(after[output][3].astype(np.float32)).all() for output in like)


def test_variants_add_few_nodes_and_no_weights(lora_manifest: Manifest, lora_bundle: Path) -> None:
    """Q, K and V of an attention, and K and V of one over a prompt, gather `down` and multiply by it together."""
    layers = [layer for layer in lora_manifest.lora_layers if layer.part == "unet"]
    paths = [
        lora_bundle / lora_manifest.graphs[name].onnx["fp32"].files[0].path for name in ("denoise", "denoise_lora")
    ]
    before, after = (Counter(node.op_type for node in _graph(path).node) for path in paths)
    shared = sum(2 if "attn1" in layer.name else 1 for layer in layers if layer.name.endswith("to_v"))
    assert after["Gather"] - before["Gather"] == 2 * len(layers) - shared
    assert after["MatMul"] - before["MatMul"] == 2 * len(layers) - shared
    assert (after.total() - before.total()) / len(layers) < 12.5
    weights = [{entry.name for entry in _graph(path).initializer if entry.external_data} for path in paths]
    assert weights[0] == weights[1]
    assert (
        lora_manifest.graphs["denoise_lora"].onnx["fp32"].files[1:]
        == lora_manifest.graphs["denoise"].onnx["fp32"].files[1:]
    )


def _graph(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def _like(manifest: Manifest, name: GraphName) -> dict[str, Array]:
    """Empty outputs of a call."""
    sizes = {**manifest.dims(manifest.resolutions[0]), "N": ROWS, "B": ROWS, "R": ROWS, "S": ROWS}
    return {port.name: np.empty(port.shape(sizes), port.dtype) for port in OUTPUTS[name]}
