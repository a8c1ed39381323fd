"""Keys of what a build keeps: hashes over all that decides a graph or an engine. The same key needs no new work.

Code is hashed by package. What only reaches an artefact through values that a key holds already, such as the shapes of
profiles, is not hashed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.backends.registry import ONNXRUNTIME_CUDA, TENSORRT
from engines.build.profiles import shapes
from engines.build.qdq.quantize import EIGHT_BITS, modelopt_version
from engines.build.trajectory import calibration_config
from engines.contract import GraphName
from engines.files import sha256_of_code
from engines.manifest import Gpu, Manifest, Onnx, Precision, Source, Storage

ENGINES = Path(__file__).parents[1]  # the package whose code is hashed
EXPORT_CODE = ("contract.py", "safetensors_header.py", "checkpoints", "export", "lora")
TENSORRT_CODE = ("build/trt",)
ONNXRUNTIME_CUDA_CODE = ("build/onnxruntime_cuda",)
QDQ_CODE = ("contract.py", "schedulers", "build/trajectory.py", "build/qdq")
INT8_CODE = (
    "contract.py",
    "schedulers",
    "build/trajectory.py",
    "build/quantize.py",
    "build/parts.py",
    "backends/openvino",
)


def export_key(source: Source, weights: Storage, versions: Mapping[str, str]) -> str:
    """The key of graphs exported from `source`, whatever its files are called, by packages of `versions`."""
    return _hash(
        {
            "source": source.sha256,  # over files, scales and tokens
            "weights": weights,
            "code": _code(EXPORT_CODE),
            "versions": dict(versions),
        }
    )


def engine_key(  # noqa: PLR0913 - what decides the engine, by keyword
    manifest: Manifest,
    graph: GraphName,
    onnx: Onnx,
    *,
    backend: str,
    version: str,
    gpu: Gpu | None,
    precision: Precision,
    optimization_level: int | None = None,
) -> str:
    """The key of the engine that `version` of `backend` makes of `onnx`, which is `graph` in one precision."""
    profiles = shapes(manifest, graph) if backend in TENSORRT else ()
    config: dict[str, Any] = {
        "onnx": [file.sha256 for file in onnx.files],
        "backend": backend,
        "version": version,
        "gpu": gpu.model_dump() if gpu else None,
        "precision": precision,
        "profiles": [sorted(shape.dims.items()) for shape in profiles],
    }
    if backend in TENSORRT:
        config |= {"code": _code(TENSORRT_CODE), "optimization_level": optimization_level}
        if precision in EIGHT_BITS:
            config["quantized"] = quantized_key(manifest, onnx, precision, modelopt=modelopt_version())
    elif backend == ONNXRUNTIME_CUDA:
        config["code"] = _code(ONNXRUNTIME_CUDA_CODE)
    elif precision == "int8":
        config |= {"code": _code(INT8_CODE), "calibration": calibration_config(manifest)}
    return _hash(config)


def quantized_key(manifest: Manifest, onnx: Onnx, precision: Precision, *, modelopt: str) -> str:
    """The key of the graph in FP8 or INT8 that `modelopt`, its version, makes of `onnx` for TensorRT."""
    return _hash(
        {
            "onnx": [file.sha256 for file in onnx.files],
            "precision": precision,
            "modelopt": modelopt,
            "code": _code(QDQ_CODE),
            "calibration": calibration_config(manifest),
        }
    )


def _code(names: tuple[str, ...]) -> str:
    return sha256_of_code(ENGINES / name for name in names)


def _hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
