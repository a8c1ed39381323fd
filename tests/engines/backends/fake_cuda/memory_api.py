"""CUDA's functions for memory."""

from __future__ import annotations

from typing import Any

from cuda.bindings import runtime

from tests.engines.backends.fake_cuda.api import Api, api
from tests.engines.backends.fake_cuda.gpu import Status


class MemoryApi(Api):
    """Device memory, pinned memory, and copies."""

    cudaMemcpyKind = runtime.cudaMemcpyKind  # noqa: N815 - the names of CUDA, here and below
    cudaHostAllocDefault = runtime.cudaHostAllocDefault  # noqa: N815

    @api
    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return Status.cudaSuccess, self.total - self.others - sum(self.live()), self.total

    @api
    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        if self._forbidden_in_capture():
            return Status.cudaErrorStreamCaptureUnsupported, None
        address = self.take(size)
        return (Status.cudaErrorMemoryAllocation, None) if address is None else (Status.cudaSuccess, address)

    @api
    def cudaFree(self, devPtr: int) -> Any:  # noqa: N802, N803
        if self._forbidden_in_capture():
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self._wait_for_all()
        return self._freed(devPtr, pinned=False)

    @api
    def cudaHostAlloc(self, size: int, flags: int) -> Any:  # noqa: N802, ARG002
        if self._forbidden_in_capture():
            return Status.cudaErrorStreamCaptureUnsupported, None
        with self._lock:
            return Status.cudaSuccess, self._allocated(size, pinned=True)

    @api
    def cudaFreeHost(self, ptr: int) -> Any:  # noqa: N802
        if self._forbidden_in_capture():
            return (Status.cudaErrorStreamCaptureUnsupported,)
        return self._freed(ptr, pinned=True)

    @api
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Any:  # noqa: N802
        kinds = self.cudaMemcpyKind
        to_host, from_host = kind == kinds.cudaMemcpyDeviceToHost, kind == kinds.cudaMemcpyHostToDevice
        if self.memory(dst, count, pinned=to_host) is None or self.memory(src, count, pinned=from_host) is None:
            return (Status.cudaErrorInvalidValue,)

        def copy() -> None:
            to, source = self.memory(dst, count, pinned=to_host), self.memory(src, count, pinned=from_host)
            if to is not None and source is not None:
                self.use(src, count)
                self.use(dst, count, writes=True)
                to[:] = source

        return self._give(stream, copy)

    @api
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> Any:  # noqa: N802, N803
        if self.memory(devPtr, count) is None:
            return (Status.cudaErrorInvalidValue,)

        def fill() -> None:
            memory = self.memory(devPtr, count)
            if memory is not None:
                self.use(devPtr, count, writes=True)
                memory[:] = value

        return self._give(stream, fill)

    def _freed(self, address: int, *, pinned: bool) -> tuple[Any]:
        block = self.blocks.get(int(address))
        if block is None or block.pinned != pinned:
            self.fault(f"{address:#x} is freed, where nothing of its kind is allocated")
            return (Status.cudaErrorInvalidValue,)
        self.give_back(int(address))
        return (Status.cudaSuccess,)

    def _wait_for_all(self) -> None:
        """As freeing the GPU's memory does."""
        for mark in [stream.mark() for stream in list(self._streams.values())]:
            self._wait(mark)
