"""What graphs that apply LoRAs must compute: each row, as the model computes it with the row's LoRAs in its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.accuracy import worst_difference
from engines.build.verify import random_case
from engines.contract import LORA_POOL, Array, GraphName, build_inputs, plain, random_values
from engines.export.graph_module import GraphModule
from engines.export.modules import Denoise, ShallowDenoise
from engines.export.prompts import EncodePrompt, EncodePromptPair
from engines.manifest import ComputeDtype, LoraLayer, Manifest, Profile
from tests.support.loaded import Loaded

RANKS = 9  # of the pool
# The ranks that update each row, and their weights: two LoRAs, none, one that another row has too, a longer one.
ROW_LORA = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 4], [5, 6, 7, 8]])
LORA_WEIGHT = np.array([[0.7, 0.7, -0.4, -0.4], [0, 0, 0, 0], [1, 1, 0, 0], [0.5, 0.5, 0.5, 0]], np.float32)
ROWS, WITHOUT = len(ROW_LORA), 1


def lora_inputs(name: GraphName, manifest: Manifest) -> dict[str, Array]:
    """Inputs of a graph that applies LoRAs: a row for each image or chunk, updated as above."""
    rng = np.random.default_rng(0)
    dims = manifest.dims(manifest.resolutions[0])
    if plain(name) == "encode_prompt":
        sizes = {**dims, "N": ROWS, "V": 20, "U": 20, "E": manifest.context.layers + 1}  # of more words
        given = build_inputs(manifest.inputs("encode_prompt"), sizes, make=random_values(rng))
    else:
        given = dict(random_case(plain(name), manifest, Profile(size=manifest.resolutions[0], batch=ROWS))[0])
    pool = (rng.standard_normal((RANKS, dims["G"])) * LORA_POOL.spread).astype(np.float16)
    return {**given, "lora_pool": pool, "row_lora": ROW_LORA, "lora_weight": LORA_WEIGHT}


def outputs_of(name: GraphName, manifest: Manifest, bundle: Path, inputs: Mapping[str, Array], like: Any) -> Any:
    return Loaded("onnxruntime", bundle / manifest.graphs[name].onnx["fp32"].files[0].path, threads=1)(inputs, like)


def by_fused_weights(name: GraphName, manifest: Manifest, parts: Mapping[str, Any], inputs: Mapping[str, Array]) -> Any:
    """The outputs, by name, whose every row is that of torch modules `parts` with the row's LoRAs in their weights."""
    updated = [part for part in parts if (part == "unet") != (plain(name) == "encode_prompt")]
    layers = {part: [layer for layer in manifest.lora_layers if layer.part == part] for part in updated}
    found: dict[str, Array] = {}
    for row in range(ROWS):
        ranks, weights = inputs["lora_pool"][inputs["row_lora"][row]], inputs["lora_weight"][row]
        module = _graph_module(name, *(fused(parts[part], layers[part], ranks, weights) for part in updated))
        for output, values in _computed(module, inputs).items():
            found.setdefault(output, values.copy())[row] = values[row]
    return found


def fused(module: Any, layers: Iterable[LoraLayer], ranks: Array, weights: Array) -> Any:
    """A copy of a torch module, W + Σ w · up · down in its layers. `ranks` are [A, G], and `weights` [A]."""
    changed = deepcopy(module)
    with torch.no_grad():
        for layer in layers:
            down = ranks[:, layer.down : layer.down + layer.inputs].astype(np.float32)
            up = ranks[:, layer.up : layer.up + layer.outputs].astype(np.float32)
            weight = changed.get_submodule(layer.name).weight
            weight += torch.from_numpy(np.einsum("a,ao,ai->oi", weights, up, down)).view_as(weight)
    return changed.eval()


def _graph_module(name: GraphName, *modules: Any) -> GraphModule:
    kinds: Mapping[GraphName, Callable[..., GraphModule]] = {
        "encode_prompt": EncodePrompt if len(modules) == 1 else EncodePromptPair,
        "denoise": Denoise,
        "denoise_shallow": ShallowDenoise,
    }
    return kinds[plain(name)](*modules).eval()


def _computed(module: GraphModule, inputs: Mapping[str, Array]) -> dict[str, Array]:
    given = {port.name: torch.from_numpy(inputs[port.name].copy()) for port in module.inputs}
    with torch.inference_mode():
        made = module(**given)
    values = made if isinstance(made, tuple) else (made,)
    return {port.name: value.numpy() for port, value in zip(module.outputs, values, strict=True)}


def fused_difference(
    name: GraphName, manifest: Manifest, bundle: Path, parts: Mapping[str, Any], computes_in: ComputeDtype = "fp32"
) -> float:
    """How far the graph `name` of a bundle is from torch modules with LoRAs in their weights, of the range."""
    inputs = lora_inputs(name, manifest)
    wanted = by_fused_weights(name, manifest, parts, inputs)
    path = bundle / manifest.graphs[name].onnx[computes_in].files[0].path
    return worst_difference(Loaded("onnxruntime", path, threads=1)(inputs, wanted), wanted).largest
