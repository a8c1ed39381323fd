"""CUDA graphs: work that is captured once and launched in one call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engines.backends.cuda.context import CudaContext
from engines.backends.cuda.status import check

_logger = logging.getLogger(__name__)

_TRIES = 2  # captures of a call: what failed once may have been an allocation, which the next finds done


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
    """Whether one bound call is still to be captured: a capture that fails is tried once more, at the next launch."""

    def __init__(self, calls: CapturedCalls, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` are those of the call's inputs."""
        self.wanted = True  # until it is given up
        self._calls = calls
        self._shapes = shapes
        self._tries = _TRIES

    def failed(self, reason: str) -> None:
        """An attempt failed: try once more, then give up."""
        self._tries -= 1
        if not self._tries:
            self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """The call runs without a graph for as long as it lives."""
        self.wanted = False
        self._calls.add_uncaptured(
            self, ", ".join(f"{name} {list(shape)}" for name, shape in self._shapes.items()), reason
        )


class CapturedCalls:
    """The calls of one engine, which are to be captured as CUDA graphs, and how many of them run without one."""

    def __init__(self, engine: str) -> None:
        """`engine` is the file's name."""
        self.uncaptured = 0  # read by other threads
        self._engine = engine
        self._impossible = ""
        self._level = logging.WARNING

    def rule_out(self, reason: str) -> None:
        """None of the calls can be captured."""
        self._impossible = reason

    def bound(self, shapes: Mapping[str, tuple[int, ...]]) -> GraphCapture:
        """The capture of a call whose inputs have these `shapes`."""
        capture = GraphCapture(self, shapes)
        if self._impossible:
            capture.give_up(self._impossible)
        return capture

    def add_uncaptured(self, capture: GraphCapture, shapes: str, reason: str) -> None:
        """Count a call that runs without a graph, as long as its `capture` lives.

        The first is a warning. Dozens of calls fail for one reason, and `Captures.report` has their number.
        """
        level, self._level = self._level, logging.DEBUG
        self.uncaptured += 1
        weakref.finalize(capture, self._dropped).atexit = False
        _logger.log(
            level,
            "%s runs without a CUDA graph, which makes it slower, for %s: %s",
            self._engine,
            shapes,
            reason,
        )

    def _dropped(self) -> None:
        self.uncaptured -= 1


class Captures:
    """The captured calls of every engine of a device."""

    def __init__(self) -> None:
        self._engines: dict[str, list[CapturedCalls]] = {}

    def of(self, path: Path) -> CapturedCalls:
        """Those of the engine at `path`, which is being loaded."""
        calls = CapturedCalls(path.name)
        self._engines.setdefault(path.stem, []).append(calls)
        return calls

    def uncaptured(self) -> dict[str, int]:
        """How many calls run without a graph although they were to be captured, by engine. For any thread."""
        return {name: sum(calls.uncaptured for calls in loaded) for name, loaded in list(self._engines.items())}

    def report(self) -> None:
        """Log how many calls run without a graph, if any do."""
        if found := {name: count for name, count in self.uncaptured().items() if count}:
            listed = ", ".join(f"{count} of {name}" for name, count in found.items())
            _logger.warning("Calls that run without a CUDA graph: %s. See the first warning of each engine.", listed)
