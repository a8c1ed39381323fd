"""The stub's CUDA runtime under the interface of the module `cuda.bindings.runtime`.

That module is linked to a runtime of its own, which asks the driver through tables that NVIDIA does not document, so it
cannot be pointed at the stub. Everything above it is ours, and runs as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuda.bindings import runtime

_INT, _SIZE, _POINTER, _FLOAT, _FLAGS = (
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_float,
    ctypes.c_ulonglong,
)
# By function: the types of what it gives, which C takes as pointers before all else, and of what it takes.
_CALLS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cudaSetDevice": ((), (_INT,)),
    "cudaGetLastError": ((), ()),
    "cudaMemGetInfo": ((_SIZE, _SIZE), ()),
    "cudaMalloc": ((_POINTER,), (_SIZE,)),
    "cudaFree": ((), (_POINTER,)),
    "cudaHostAlloc": ((_POINTER,), (_SIZE, _INT)),
    "cudaFreeHost": ((), (_POINTER,)),
    "cudaMemsetAsync": ((), (_POINTER, _INT, _SIZE, _POINTER)),
    "cudaMemcpyAsync": ((), (_POINTER, _POINTER, _SIZE, _INT, _POINTER)),
    "cudaDeviceGetStreamPriorityRange": ((_INT, _INT), ()),
    "cudaStreamCreateWithPriority": ((_POINTER,), (_INT, _INT)),
    "cudaStreamDestroy": ((), (_POINTER,)),
    "cudaStreamSynchronize": ((), (_POINTER,)),
    "cudaStreamQuery": ((), (_POINTER,)),
    "cudaStreamWaitEvent": ((), (_POINTER, _POINTER, _INT)),
    "cudaStreamBeginCapture": ((), (_POINTER, _INT)),
    "cudaGraphInstantiate": ((_POINTER,), (_POINTER, _FLAGS)),
    "cudaGraphLaunch": ((), (_POINTER, _POINTER)),
    "cudaGraphDestroy": ((), (_POINTER,)),
    "cudaGraphExecDestroy": ((), (_POINTER,)),
    "cudaEventCreateWithFlags": ((_POINTER,), (_INT,)),
    "cudaEventDestroy": ((), (_POINTER,)),
    "cudaEventRecord": ((), (_POINTER, _POINTER)),
    "cudaEventQuery": ((), (_POINTER,)),
    "cudaEventSynchronize": ((), (_POINTER,)),
    "cudaEventElapsedTime": ((_FLOAT,), (_POINTER, _POINTER)),
}


class StubRuntime:
    """`cuda.bindings.runtime` over the stub. Constants and types are the real module's."""

    def __init__(self, library: Path) -> None:
        """`library` is the stub's libcudart."""
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def mark(self, name: str) -> None:
        """Add a mark to the record, and write it out."""
        self._library.stub_mark(name.encode())

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int | None]:  # noqa: N802 - CUDA's name
        graph = _POINTER()
        status = self._library.cudaStreamEndCapture(_POINTER(stream), ctypes.byref(graph))
        return runtime.cudaError_t(status), graph.value

    def __getattr__(self, name: str) -> Any:
        return self._function(name, *_CALLS[name]) if name in _CALLS else getattr(runtime, name)

    def _function(self, name: str, gives: tuple[Any, ...], takes: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
        function = getattr(self._library, name)

        def call(*given: Any) -> tuple[Any, ...]:
            results = [kind() for kind in gives]
            arguments = [kind(None if value is None else int(value)) for kind, value in zip(takes, given, strict=True)]
            status = function(*(ctypes.byref(result) for result in results), *arguments)
            values = [result.value for result in results]
            if name == "cudaStreamCreateWithPriority":
                values = [runtime.cudaStream_t(init_value=values[0])]
            return runtime.cudaError_t(status), *values

        return call
