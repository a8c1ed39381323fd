"""The backends by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from engines.backends.device import Device
from engines.errors import EngineError

# Backends are imported when they are asked for, so a missing package costs only those who need it.
_BACKENDS = {
    "tensorrt": "engines.backends.tensorrt",
    "tensorrt_rtx": "engines.backends.tensorrt_rtx",
    "onnxruntime_cuda": "engines.backends.onnxruntime_cuda",
    "openvino": "engines.backends.openvino",
    "onnxruntime": "engines.backends.onnxruntime",
}
ON_CPU = ("openvino", "onnxruntime")  # they load the FP32 graphs as they are, so every bundle can be served by them
EXTRAS = {
    "tensorrt": "cuda",
    "tensorrt_rtx": "rtx",
    "onnxruntime_cuda": "cuda",
    "openvino": "openvino",
    "onnxruntime": "cpu",
}
BACKENDS = tuple(_BACKENDS)  # the fastest first


def open_device(backend: str, *, threads: int = 0) -> Device:
    """Open the device behind `backend`, with `threads` CPU threads (0: one per core).

    Raises:
        EngineError: the name is unknown or its package is not installed.
    """
    if backend not in _BACKENDS:
        raise EngineError(f"There is no backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    try:
        module = import_module(_BACKENDS[backend])
    except ImportError as error:
        raise EngineError(needs(backend, str(error.name))) from error
    opener: Callable[..., Device] = module.open_device
    return opener(threads=threads)


def needs(backend: str, package: str) -> str:
    """What to tell people who lack the package behind a backend."""
    return f"Backend {backend} needs the package {package}: pip install 'latentd[{EXTRAS[backend]}]'."
