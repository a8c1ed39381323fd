"""TensorRT for RTX, whose engines are built without a GPU and compiled further on the GPU that runs them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engines.backends.cuda import CudaStream
from engines.backends.tensorrt.device import TensorRtDevice, open_package
from engines.backends.tensorrt.engine import Contexts
from engines.files import read_own, write_own

_logger = logging.getLogger(__name__)


class RtxContexts(Contexts):
    """Creates the contexts of one engine, and keeps the kernels compiled for them in `<engine>.cache` next to it.

    TensorRT for RTX compiles kernels for this GPU and these shapes when they first run, which takes seconds. It reuses
    the cache if the GPU, its driver and the package are the same, which it checks by itself.
    """

    def __init__(self, engine: Any, path: Path, *, trt: Any) -> None:
        super().__init__(engine, path, trt=trt)
        self._file = path.with_name(f"{path.name}.cache")
        self._runtime_config = runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Compile kernels specialized for each bound shape in its first run. Lazily, they would be compiled in the
        # background, and graphs captured before that would keep the slower kernels that serve every shape.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        # `TensorRtCall` captures whole steps; graphs that the runtime captures by itself cannot be part of that.
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._runtime_cache = runtime_config.create_runtime_cache()
        self._restore()
        self._saved = self._content()
        if not runtime_config.set_runtime_cache(self._runtime_cache):
            _logger.warning(
                "TensorRT for RTX accepts no cache for %s, so its kernels are compiled again at each start.", path.name
            )

    def create(self) -> Any:
        return self.engine.create_execution_context(self._runtime_config)

    def capturable(self, context: Any, stream: CudaStream) -> bool:
        return bool(context.is_stream_capturable(stream.handle))

    def end_warm_up(self) -> None:
        """Write the cache if kernels were added to it. A folder that cannot be written is only a warning."""
        content = self._content()
        if content == self._saved:
            return
        try:
            write_own(self._file, content)
        except OSError as error:
            _logger.warning(
                "The kernels compiled for %s cannot be saved, and are compiled again at the next start: %s",
                self.path.name,
                error,
            )
        else:
            self._saved = content

    def _content(self) -> bytes:
        return bytes(self._runtime_cache.serialize() or b"")

    def _restore(self) -> None:
        """Fill the cache from the file, unless that is missing, unsafe to read, damaged or of another GPU."""
        try:
            content = read_own(self._file)
        except FileNotFoundError:
            return
        except OSError as error:
            _logger.warning("%s is ignored, and kernels are compiled again: %s", self._file, error)
            return
        if not self._runtime_cache.deserialize(content):
            _logger.warning(
                "%s is damaged, or of another GPU, driver or version: kernels are compiled again.", self._file
            )


def open_device(*, threads: int) -> TensorRtDevice:  # noqa: ARG001 - every backend is opened alike
    """Open the GPU through TensorRT for RTX. Raises EngineError if the GPU, its driver or the package is missing."""
    return open_package("tensorrt_rtx", extra="rtx", contexts=RtxContexts)
