"""TensorRT for RTX, whose engines are built without a GPU and finished on the one that runs them."""

from __future__ import annotations

from engines.tensorrt import TensorRtDevice, open_package


def open_device(*, threads: int) -> TensorRtDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through TensorRT for RTX. Raises EngineError where the GPU, its driver or the package is missing."""
    return open_package("tensorrt_rtx", extra="rtx")
