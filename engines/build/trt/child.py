"""The process that builds one engine: reads a `BuildJob` from stdin, and writes a line per message to stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.build.trt.builder import TensorRtBuilder, load_tensorrt
from engines.build.trt.disk import check_writable, peak_memory, remove, write_engine
from engines.build.trt.errors import REDUCE, BuildError, OutOfMemory, format_bytes
from engines.build.trt.messages import (
    BuildFailure,
    BuildJob,
    EngineReport,
    MemoryUsed,
    Message,
    PhaseFinished,
    PhaseStarted,
    encode,
)

_GRACE = 3.0  # seconds in which a cancelled build may end by itself
_HEARTBEAT = 0.5  # seconds between messages of memory


def main() -> int:
    """Do the job on stdin. The build runs in another thread, so that this one handles signals meanwhile."""
    job = BuildJob(**json.load(sys.stdin))
    parent = _ParentConnection(os.dup(1))
    os.dup2(2, 1)  # what libraries print to stdout goes to stderr
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, parent.cancel)
    build = threading.Thread(target=_run, args=(job, parent), daemon=True)
    build.start()
    while build.is_alive():
        parent.send(MemoryUsed(peak_memory()))
        build.join(_HEARTBEAT)
        if parent.grace_expired:
            remove(Path(job.temporary))
            os._exit(1)  # TensorRT checks for cancellation only between its steps, and one may take minutes
    return 0 if parent.answered else 1


class _ParentConnection:
    """Sends messages to the parent, which cancels the build by a signal, or by closing the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()
        self._cancelled_at: float | None = None
        self.answered = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled_at is not None

    @property
    def grace_expired(self) -> bool:
        return self._cancelled_at is not None and time.monotonic() > self._cancelled_at + _GRACE

    def cancel(self, *_: object) -> None:
        """Also a signal handler."""
        self._cancelled_at = self._cancelled_at or time.monotonic()

    def send(self, message: Message) -> None:
        with self._lock:
            try:
                self._file.write(encode(message))
                self._file.flush()
            except BrokenPipeError:
                self.cancel()

    def send_last(self, message: EngineReport | BuildFailure) -> None:
        self.send(message)
        self.answered = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of one step, in addition to TensorRT's."""
        self.send(PhaseStarted(name, 1))
        yield
        self.send(PhaseFinished(name))


def _run(job: BuildJob, parent: _ParentConnection) -> None:
    try:
        parent.send_last(_build(job, parent))
    except BuildError as error:
        parent.send_last(BuildFailure(type(error).__name__, str(error)))
    except MemoryError:
        text = f"The build ran out of memory at {format_bytes(peak_memory())}: {REDUCE}."
        parent.send_last(BuildFailure(OutOfMemory.__name__, text))
    finally:
        remove(Path(job.temporary))


def _build(job: BuildJob, parent: _ParentConnection) -> EngineReport:
    started = time.monotonic()
    out, temporary = Path(job.out), Path(job.temporary)
    compiler = TensorRtBuilder(load_tensorrt(job.module), parent)
    check_writable(out, temporary)
    plan = compiler.compile(job)
    seconds, memory = time.monotonic() - started, peak_memory()
    layers, activations = compiler.measure(plan)
    with parent.phase("Writing the engine"):  # last, so that an older engine stays if anything fails
        write_engine(plan, out, temporary)
    return EngineReport(
        layers=layers,
        seconds=seconds,
        memory=memory,
        activations=activations,
        reused_timings=compiler.reused_timings,
    )


if __name__ == "__main__":
    sys.exit(main())
