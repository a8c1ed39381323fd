"""ONNX Runtime's CUDA execution provider, over buffers in the host's memory.

Simple, and slower than it could be: ONNX Runtime copies every input to the GPU and every output back in each run.
"""

from __future__ import annotations

import onnxruntime as ort

from engines.base import EngineError
from engines.onnxruntime import OnnxRuntimeDevice

PROVIDER = "CUDAExecutionProvider"


def open_device(*, threads: int) -> OnnxRuntimeDevice:
    """Open the GPU through ONNX Runtime. Raises EngineError where the installed ONNX Runtime has no CUDA."""
    if PROVIDER not in ort.get_available_providers():
        raise EngineError(
            "This ONNX Runtime computes on the CPU only: pip uninstall onnxruntime, "
            "then pip install 'latentd[cuda]' in place of 'latentd[cpu]'."
        )
    ort.preload_dlls()  # finds the libraries of CUDA and cuDNN where pip has put them
    return OnnxRuntimeDevice(threads=threads, provider=PROVIDER)
