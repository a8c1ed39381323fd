"""The graphs apply a packed LoRA as the build fuses its file: real graphs in ONNX Runtime, in every form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from engines.contract import LORA_GRAPHS, Array, GraphName
from engines.export.trace import Traced, traced_graphs
from engines.lora.pack import PackedLora, pack_lora
from engines.manifest import Manifest
from tests.support.checkpoints import load
from tests.support.loras import FORMS, FileForm, early_layers, make_changes, shapes_in, write_lora

WEIGHT = 0.75  # of the request, or of --lora
GRAPHS: tuple[GraphName, ...] = ("encode_prompt", "denoise")


def traced(checkpoint: Path, manifest: Manifest, *loras: Lora) -> dict[GraphName, Traced]:
    """The plain graphs as the build exports them, with `loras` fused."""
    modules = load(find_checkpoint(str(checkpoint), loras=loras))
    return traced_graphs(modules, manifest.latent, manifest.context)


def apply(bundle: Path, graph: GraphName, plain: Traced, packed: PackedLora) -> Mapping[str, Array]:
    """What the graph of the bundle computes where every row has the LoRA, at ranks out of order."""
    manifest = Manifest.load(bundle)
    assert manifest.lora
    variant = manifest.graphs[LORA_GRAPHS[graph]]
    session = onnxruntime.InferenceSession(bundle / variant.onnx["fp32"].files[0].path)
    places = np.random.default_rng(1).permutation(manifest.lora.ranks)[: len(packed.values)]
    pool = np.random.default_rng(2).normal(size=(manifest.lora.ranks, packed.values.shape[1])).astype(np.float16)
    pool[places] = packed.values
    inputs = {name: value.numpy() for name, value in plain.random_inputs().items()}
    rows = len(inputs["ids" if graph == "encode_prompt" else "row_image"])
    inputs |= {
        "lora_pool": pool,
        "row_lora": np.tile(places, (rows, 1)).astype(np.int64),
        "lora_weight": np.full((rows, len(places)), WEIGHT, np.float32),
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def decibels(found: Array, wanted: Array, plain: Array) -> float:
    """Peak signal to noise, the peak being the largest change that the LoRA makes: stricter than that of the output."""
    change, error = (values.astype(np.float64) for values in (wanted - plain, found - wanted))
    return 20 * math.log10(float(np.abs(change).max()) / float(np.sqrt(np.mean(error**2))))


@pytest.fixture(scope="module")
def without(checkpoint: Path, lora_bundle: Path) -> dict[GraphName, Traced]:
    return traced(checkpoint, Manifest.load(lora_bundle))


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_lora_does_what_the_fused_one_does(
    checkpoint: Path, lora_bundle: Path, tmp_path: Path, form: FileForm, without: dict[GraphName, Traced]
) -> None:
    manifest = Manifest.load(lora_bundle)
    shapes = shapes_in(manifest)
    changes = make_changes(early_layers(shapes) if form == "early" else shapes, seed=4, rank=3, strength=0.2)
    path = write_lora(tmp_path / "style.safetensors", changes, form, alpha=2)
    packed, fused = pack_lora(path, manifest), traced(checkpoint, manifest, Lora(path, WEIGHT))
    for graph in GRAPHS:
        wanted = fused[graph].compute(fused[graph].random_inputs())
        plain = without[graph].compute(without[graph].random_inputs())
        found = apply(lora_bundle, graph, fused[graph], packed)
        for output in wanted.keys() - {"is_finite"}:
            assert decibels(found[output], wanted[output], plain[output]) >= 60, (graph, output)
