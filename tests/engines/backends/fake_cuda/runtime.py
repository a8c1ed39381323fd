"""The module `cuda.bindings.runtime`, with a GPU of its own."""

from __future__ import annotations

import threading
from typing import Any, cast

from cuda.bindings import runtime

from tests.engines.backends.fake_cuda.api import api
from tests.engines.backends.fake_cuda.gpu import Status
from tests.engines.backends.fake_cuda.graph_api import GraphApi
from tests.engines.backends.fake_cuda.memory_api import MemoryApi
from tests.engines.backends.fake_cuda.stream_api import StreamApi

_thread = threading.local()


def current() -> FakeCuda:
    """The GPU of this thread, as libraries find it."""
    return cast("FakeCuda", _thread.cuda)


class FakeCuda(MemoryApi, StreamApi, GraphApi):
    """The module, with a GPU of its own. Names and parameters are those of `cuda.bindings.runtime`."""

    @api
    def cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        _thread.cuda = self
        return (Status.cudaSuccess if device == 0 else Status.cudaErrorInvalidDevice,)

    @api
    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, 1

    @api
    def cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802, ARG002
        found = runtime.cudaDeviceProp()
        found.name, found.major, found.minor = b"Fake GPU".ljust(256, b"\0"), 8, 9
        return Status.cudaSuccess, found

    @api
    def cudaGetLastError(self) -> Any:  # noqa: N802
        return (Status.cudaSuccess,)
