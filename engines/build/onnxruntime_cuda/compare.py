"""Compares a rewritten graph with the exported one: both on the CPU, in FP32, on the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from engines.accuracy import tolerance, worst_difference
from engines.backends.onnxruntime import FOLDER_OF_WEIGHTS
from engines.build.onnxruntime_cuda.reference import on_cpu
from engines.contract import Array, Arrays, GraphName, build_inputs, random_values
from engines.errors import EngineError
from engines.manifest import Difference, Manifest, Size

# Small, and where they can be different, so that no dimension passes for another.
_SIZES = {"S": 5, "C": 7, "P": 4, "B": 2, "R": 3, "L": 2, "N": 2, "n": 2, "Q": 9, "A": 4}


def check_same(name: GraphName, manifest: Manifest, exported: Path, made: Path) -> Difference:
    """How far graph `made` differs from `exported`, both `name` of one model.

    Raises:
        EngineError: it computes something else.
    """
    inputs = small_inputs(name, manifest)
    found = worst_difference(compute(made, inputs), compute(exported, inputs))
    allowed = tolerance("fp32", manifest.graphs[name].outputs)
    if not found.largest <= allowed:  # NaN fails too
        raise EngineError(
            f"{made.name} differs from {exported.name} by {found.largest:.1e} of its range, more than {allowed:.0e}: "
            "this model cannot be compiled for onnxruntime_cuda. Choose another --backend, and report the model."
        )
    return found


def small_inputs(name: GraphName, manifest: Manifest) -> dict[str, Array]:
    """Random inputs of the smallest image size that is not square."""
    side, context = manifest.latent.multiple, manifest.context
    words = context.tokens  # it has more, as any tokenizer has
    vocabulary = {"V": words, "U": words, "E": context.layers + 1}
    sizes = {**manifest.dims(Size(width=3 * side, height=2 * side)), **vocabulary, **_SIZES}
    ports = manifest.inputs(name)
    return build_inputs(ports, sizes, make=random_values(np.random.default_rng(0)))


def compute(path: Path, inputs: Arrays) -> dict[str, Array]:
    """What the graph at `path` computes on the CPU in FP32, by the names of its outputs. Raises EngineError."""
    options = ort.SessionOptions()
    options.add_session_config_entry(FOLDER_OF_WEIGHTS, str(path.parent))
    options.log_severity_level = 3  # errors only
    try:
        model = on_cpu(ir.load(path)).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        values = session.run(None, dict(inputs))
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes
        raise EngineError(f"ONNX Runtime cannot compute {path} on the CPU, to check it: {error}") from error
    return {port.name: value for port, value in zip(session.get_outputs(), values, strict=True)}
