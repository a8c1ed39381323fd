"""Counts what the graphs of a step do, by a profile of ONNX Runtime: it says every node's shapes."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from benchmarks.lora.results import CountedRank, GraphFigures, Ranks, StepCounts
from benchmarks.lora.steps import PLAIN, random_pool, step_inputs
from engines.backends.onnxruntime import FOLDER_OF_WEIGHTS
from engines.contract import LORA_GRAPHS, LORA_POOL, Arrays
from engines.manifest import LoraLayer, Manifest, Size

Node = Mapping[str, Any]  # the arguments of a profile's event
_GATHERS = frozenset({"Gather", "GatherND", "GatherElements"})


def count_graphs(bundle: Path, size: Size, ranks: Sequence[int]) -> GraphFigures:
    """The counts of a row without LoRAs, and with one of each rank."""
    manifest = Manifest.read(bundle)
    counted = [
        CountedRank(rank=rank, counts=_count(bundle, manifest, size, (rank,)), layout=row_bytes(manifest, rank))
        for rank in ranks
    ]
    return GraphFigures(size=str(size), plain=_count(bundle, manifest, size, ()), ranks=tuple(counted))


def row_bytes(manifest: Manifest, rank: int) -> int:
    """The bytes of the factors that a row of a step reads from the pool for a LoRA of `rank`."""
    return rank * 2 * sum(layer.inputs + layer.outputs for layer in unet_layers(manifest))


def unet_layers(manifest: Manifest) -> list[LoraLayer]:
    return [layer for layer in manifest.lora_layers if layer.part == "unet"]


def _count(bundle: Path, manifest: Manifest, size: Size, ranks: Ranks) -> StepCounts:
    """The counts of one guided image's step, for one of its two rows."""
    path = bundle / manifest.graphs[LORA_GRAPHS[PLAIN] if ranks else PLAIN].onnx["fp32"].files[0].path
    inputs = step_inputs(manifest, size, images=1, ranks=ranks)
    if ranks:
        width = next(spec.shape for spec in manifest.graphs["denoise_lora"].inputs if spec.name == LORA_POOL.name)[1]
        inputs[LORA_POOL.name] = random_pool(sum(ranks), int(width))
    nodes = profile(path, inputs, fused=False)
    rows = len(inputs["timestep"])
    return StepCounts(
        nodes=len(nodes),
        kernels=len(profile(path, inputs, fused=True)),
        flops=sum(map(flops_of, nodes)) / rows,
        gathered=sum(map(gathered_by, nodes)) // rows,
    )


def profile(path: Path, inputs: Arrays, *, fused: bool) -> list[Node]:
    """The nodes of one run of the graph, as exported, or as ONNX Runtime fuses them."""
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.enable_profiling = True
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(path.parent))
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return [event["args"] for event in events if event["name"].endswith("_kernel_time")]


def flops_of(node: Node) -> float:
    """Multiplications and additions of a matrix product or a convolution; 0 for other nodes."""
    inputs, outputs = _shapes(node["input_type_shape"]), _shapes(node["output_type_shape"])
    if node["op_name"] in {"MatMul", "Gemm"}:
        return 2.0 * math.prod(outputs[0]) * inputs[0][-1]
    if node["op_name"] == "Conv":
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    return 0.0


def gathered_by(node: Node) -> int:
    """The bytes that a node reads from the LoRA pool, the only thing that graphs in FP32 gather from in FP16."""
    if node["op_name"] not in _GATHERS or "float16" not in node["input_type_shape"][0]:
        return 0
    return 2 * math.prod(_shapes(node["output_type_shape"])[0])


def _shapes(typed: Iterable[Mapping[str, Sequence[int]]]) -> list[Sequence[int]]:
    return [shape for one in typed for shape in one.values()]
