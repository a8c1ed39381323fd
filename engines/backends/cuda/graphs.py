"""CUDA graphs: work that is captured once and launched in one call."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.status import check

_logger = logging.getLogger(__name__)


class CudaGraph:
    """Captured work that is launched on the stream it was captured from. It is destroyed before what it points to."""

    def __init__(self, cuda: CudaContext, executable: Any, *, stream: int, keep: tuple[object, ...]) -> None:
        """`stream` is a handle. `keep` lists what the graph points to, its stream included."""
        self._calls = cuda.calls
        self._executable = executable
        self._stream = stream
        self._keep = keep
        cuda.releases.release_with(self, partial(cuda.calls.cudaGraphExecDestroy, executable))

    def launch(self) -> None:
        """Raises EngineError if the launch failed and nothing changed. DeviceLost."""
        check(self._calls.cudaGraphLaunch(self._executable, self._stream))


class GraphCapture:
    """Whether the calls of one engine are captured as CUDA graphs. Disabling it is logged once per engine."""

    def __init__(self, engine: str) -> None:
        """`engine` is the file's name."""
        self._engine = engine
        self.enabled = True

    def disable(self, reason: str) -> None:
        self.enabled = False
        _logger.warning("%s runs without CUDA graphs, which makes each step slower: %s", self._engine, reason)
