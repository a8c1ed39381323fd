"""Engines that a bundle lacks, compiled at the start by the command that people use: `build_engines.py compile`.

It runs in a process of its own. So the server imports nothing of the build, the compiler's memory is freed
when it ends, and a crash of it is reported as an error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from engines.backends.available import check_fits, unavailable_reason
from engines.backends.registry import ON_CPU, build_command, install_command
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import Manifest
from server.runtime.failures import StartStopped

_log = logging.getLogger(__name__)
_LOCK = ".compiling"  # in the bundle's folder; the file stays, since removing it would let two hold the lock
_POLL = 0.5  # seconds between checks of whether to stop, and whether the lock is free
_GRACE = 5.0  # seconds in which a cancelled build may remove temporary files; Docker grants 10 in all
_TAIL = 5  # lines of output in the error of a build that ended without one

OnStatus = Callable[[str], None]


class CompilingStopped(StartStopped):
    """The server was stopped before its engines were compiled."""


def compile_missing(
    manifest: Manifest, bundle: Path, backend: str, *, on_status: OnStatus, stopped: Callable[[], bool] = lambda: False
) -> Manifest:
    """Compile the engines of `backend` where the bundle in folder `bundle` has none that run here; minutes on a GPU.

    `on_status` is called in this thread with the progress: "compiling denoise for tensorrt, 2 of 4 engines, 40 %". The
    build ends when this process does, and when `stopped`, which is polled twice a second, returns True; finished
    engines are kept. Of several servers that start over one bundle, one compiles, and the others wait for it.

    Returns:
        The manifest with the engines in it, every file verified; `manifest` itself where nothing was missing.

    Raises:
        EngineError: the engines cannot be compiled here, or the bundle cannot be written; says what the build event.
        CompilingStopped: `stopped` event yes, or `on_status` raised StartStopped.
    """
    if _has_engines(manifest, bundle, backend):
        return manifest
    try:
        with _lock(bundle, backend, on_status, stopped) as lock:
            manifest = Manifest.load(bundle)  # which another server may have written meanwhile
            if _has_engines(manifest, bundle, backend):
                return manifest
            command, graphs = _command(manifest, bundle, backend), manifest.graph_names
            _build(command, backend, graphs, lock=lock, on_status=on_status, stopped=stopped)
            return Manifest.load(bundle)
    except StartStopped as stop:  # noticed by `stopped` or by `on_status`, whichever was first
        message = "The server was stopped while its engines were compiled: the next start goes on."
        raise CompilingStopped(message) from stop


def _has_engines(manifest: Manifest, bundle: Path, backend: str) -> bool:
    """Whether there is nothing to compile, or compiling would not help."""
    if backend in ON_CPU:
        return True
    if backend not in manifest.builds:
        return False
    if unavailable_reason(backend):
        return True  # no GPU, say: other engines would run no better
    try:
        check_fits(manifest, backend, bundle)
    except EngineError as error:
        _log.warning("%s", error)
        return False
    return True


@contextmanager
def _lock(bundle: Path, backend: str, on_status: OnStatus, stopped: Callable[[], bool]) -> Iterator[IO[bytes]]:
    """Hold the bundle, alone among the servers of all containers that share its folder."""
    try:
        file = (bundle / _LOCK).open("ab")
    except OSError as error:
        raise EngineError(
            f"{bundle} holds no {backend} engines that run here, and none can be written there ({error.strerror}): "
            f"let the server write to it, or first run {build_command('compile', bundle, '--backend', backend)}"
        ) from error
    with file:
        _wait_for(file, on_status, stopped)
        yield file


def _wait_for(file: IO[bytes], on_status: OnStatus, stopped: Callable[[], bool]) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_status("waiting for another server that compiles this bundle")
            _raise_if_stopped(stopped)
            time.sleep(_POLL)
        else:
            return


def _raise_if_stopped(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise StartStopped


def _command(manifest: Manifest, bundle: Path, backend: str) -> list[str]:
    # A bundle that was exported for CPUs alone holds FP32 graphs, of which GPUs can be served too.
    halved = {"fp16", "bf16"} & manifest.graphs["denoise"].onnx.keys()
    precision = [] if halved else ["--precision", "fp32"]
    build = [sys.executable, "-P", "-m", "build_engines", "compile", str(bundle), "--backend", backend]
    return [*build, *precision, "--progress", "json"]


def _build(
    command: list[str],
    backend: str,
    graphs: Sequence[GraphName],
    *,
    lock: IO[bytes],
    on_status: OnStatus,
    stopped: Callable[[], bool],
) -> None:
    if not find_spec("rich"):
        raise EngineError(f"Compiling at the start needs the package rich: {install_command('compile')}")
    tail: deque[str] = deque(maxlen=_TAIL)
    with _running(command, lock) as child:
        for line in _lines(child, stopped):
            event = _parsed(line)
            if "stage" in event:
                on_status(_status_of(event, backend, graphs))
            elif "note" in event:
                _log.info("%s", event["note"])
            else:
                _log.debug("%s", line)
                tail.append(line)
        status = child.wait()
    if status:
        raise EngineError(f"The {backend} engines were not compiled. {_reason(status, list(tail))}")


@contextmanager
def _running(command: list[str], lock: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The build. It ends with the context, or when our end of its standard input is closed because we are gone.

    It inherits `lock`, so that the lock stays held as long as the build writes.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # imports what we do
    child = subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        encoding="utf-8",
        errors="replace",
        pass_fds=(lock.fileno(),),
        process_group=0,  # a terminal's Ctrl-C is for the server, which ends the build
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Have the child cancel its build, and kill it if that takes longer than the grace."""
    assert child.stdin  # noqa: S101 - piped in _running
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:
        child.kill()
        child.wait()


def _lines(child: subprocess.Popen[str], stopped: Callable[[], bool]) -> Iterator[str]:
    """What the child says, line by line, until it ends. Raises StartStopped between two of them."""
    event: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        assert child.stdout  # noqa: S101 - piped in _running
        with child.stdout as lines:
            for line in lines:
                event.put(line)
        event.put(None)

    threading.Thread(target=listen, name="compiling", daemon=True).start()
    while True:
        _raise_if_stopped(stopped)
        try:
            line = event.get(timeout=_POLL)
        except queue.Empty:
            continue
        if line is None:
            return
        if line.strip():
            yield line.rstrip()


def _parsed(line: str) -> dict[str, Any]:
    """What `--progress json` says; nothing where the line is a table's, an error's, or a library's."""
    with suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    return {}


def _status_of(event: dict[str, Any], backend: str, graphs: Sequence[GraphName]) -> str:
    parts = [event["stage"]]
    for position, graph in enumerate(graphs, start=1):
        if event["stage"] == f"compiling {graph} for {backend}":
            parts.append(f"{position} of {len(graphs)} engines")
    if event["percent"] is not None:
        parts.append(f"{event['percent']} %")
    return ", ".join(parts)


def _reason(status: int, tail: list[str]) -> str:
    if status < 0:
        return f"The build was killed by signal {-status}, as happens where memory runs out: see the system's log."
    errors = [line.removeprefix("error: ") for line in tail if line.startswith("error: ")]
    return errors[-1] if errors else f"The build ended with status {status}: {' | '.join(tail) or 'without a word'}"
