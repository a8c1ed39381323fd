"""CUDA's functions for graphs."""

from __future__ import annotations

import threading
from typing import Any

from cuda.bindings import runtime

from tests.engines.backends.fake_cuda.api import Api, api
from tests.engines.backends.fake_cuda.gpu import Status
from tests.engines.backends.fake_cuda.streams import Capture, Work, handles


class GraphApi(Api):
    """Capture of streams, and graphs of what they captured."""

    def __init__(self, **memory: Any) -> None:
        """A GPU as `Gpu` takes it."""
        super().__init__(**memory)
        self._graphs: dict[int, list[Work]] = {}

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    @api
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
        found = self._streams[int(stream)]
        if found.capture:
            return (Status.cudaErrorIllegalState,)
        found.capture = Capture(found, mode, threading.get_ident())
        self._captures.append(found.capture)
        return (Status.cudaSuccess,)

    @api
    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        capture = self._streams[int(stream)].capture
        if capture is None:
            return Status.cudaErrorIllegalState, None
        self._captures.remove(capture)
        for one in self._streams.values():
            one.capture = None if one.capture is capture else one.capture
        if capture.thread != threading.get_ident():
            return Status.cudaErrorStreamCaptureWrongThread, None
        if capture.broken:
            return Status.cudaErrorStreamCaptureInvalidated, None
        forked = [one for one in capture.given if one is not capture.origin]
        if any(capture.joined[one] < capture.given[one] for one in forked):
            return Status.cudaErrorStreamCaptureUnjoined, None
        return Status.cudaSuccess, runtime.cudaGraph_t(init_value=self._graph(capture.work))

    @api
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802, ARG002
        return Status.cudaSuccess, runtime.cudaGraphExec_t(init_value=self._graph(self._graphs[int(graph)]))

    @api
    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> Any:  # noqa: N802, N803
        captured = self._graphs[int(graphExec)]

        def replay() -> None:
            for work in captured:
                work()

        return self._give(stream, replay)

    @api
    def cudaGraphDestroy(self, graph: Any) -> Any:  # noqa: N802
        return (Status.cudaSuccess if self._graphs.pop(int(graph), None) is not None else Status.cudaErrorInvalidValue,)

    @api
    def cudaGraphExecDestroy(self, graphExec: Any) -> Any:  # noqa: N802, N803
        return self.cudaGraphDestroy(graphExec)

    def _graph(self, work: list[Work]) -> int:
        handle = next(handles)
        self._graphs[handle] = work
        return handle
