"""Building an engine in a process of its own, because a failed TensorRT build can break the next in the same process.

`build_engine` starts `engines.build.trt.child`, sends it a `BuildJob`, and follows its messages.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from engines.backends.registry import TENSORRT
from engines.build.trt.disk import remove
from engines.build.trt.errors import KINDS, REDUCE, BuildError, OutOfMemory, Unavailable, format_bytes
from engines.build.trt.messages import (
    BuildFailure,
    BuildJob,
    BuildWarning,
    EngineReport,
    MemoryUsed,
    Message,
    PhaseAdvanced,
    PhaseFinished,
    PhaseStarted,
    Ranges,
    decode,
)
from engines.files import temporary_for
from engines.progress import Progress, Stage

_GRACE = 3.0  # seconds in which a cancelled build may end by itself


TIMING_CACHE = "timing.cache"  # next to the engines; all graphs share it, and `--force` keeps it


def build_engine(
    module: str,
    onnx: Path,
    out: Path,
    profiles: Sequence[Ranges],
    *,
    optimization_level: int | None = None,
    progress: Progress,
) -> EngineReport:
    """Compile the graph at `onnx` to `out`, optimised for `profiles` in their order, with "tensorrt" or "tensorrt_rtx".

    `out` is replaced atomically, and left as it was if the build fails. With an `optimization_level`, 0 to 5, which
    "tensorrt" alone has, timings of kernels are reused from build to build by `TIMING_CACHE` next to `out`.

    Raises:
        BuildError: a subclass names what is missing: the package, a GPU, an operator, memory or disk space.
        KeyboardInterrupt: the build was cancelled, and its process has ended.
    """
    if module not in TENSORRT:
        raise Unavailable(f"There is no TensorRT called {module!r}: choose one of {', '.join(TENSORRT)}.")
    temporary = temporary_for(out)
    job = BuildJob(
        module=module,
        onnx=str(onnx),
        out=str(out),
        temporary=str(temporary),
        profiles=[dict(profile) for profile in profiles],
        optimization_level=optimization_level,
        timing_cache=None if optimization_level is None else str(out.with_name(TIMING_CACHE)),
    )
    try:
        with tempfile.TemporaryFile() as stderr, _running(job, stderr) as child:
            return _follow(child, stderr, progress)
    finally:
        remove(temporary)


@contextmanager
def _running(job: BuildJob, stderr: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The child process, working on `job`. It is ended when the `with` block is left."""
    # The child imports from the same places as this process, and nothing from its working directory.
    here = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*(path or here for path in sys.path), here])}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "engines.build.trt.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    try:
        assert child.stdin  # noqa: S101 - piped above
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(job.to_json())
        yield child
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    """Ask the child to cancel its build, and kill it if that takes longer than the grace period."""
    assert child.stdout  # noqa: S101 - piped in _running
    child.stdout.close()  # so that it does not block on a full pipe
    child.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:
        child.kill()
        child.wait()


def _follow(child: subprocess.Popen[str], stderr: IO[bytes], progress: Progress) -> EngineReport:
    """Show the child's messages as progress until its last one."""
    memory = 0
    with _Phases(progress) as phases:
        for message in _messages(child):
            match message:
                case MemoryUsed(peak):
                    memory = peak
                case BuildWarning(text):
                    progress.note(text)
                case BuildFailure(kind, text):
                    raise KINDS[kind](text)
                case EngineReport():
                    return message
                case _:
                    phases.follow(message)
    raise _unexpected_end(child.wait(), memory, stderr)


def _messages(child: subprocess.Popen[str]) -> Iterator[Message]:
    assert child.stdout  # noqa: S101 - piped in _running
    for line in child.stdout:
        if line.endswith("\n"):  # a killed child may leave half a line
            yield decode(line)


def _unexpected_end(status: int, memory: int, stderr: IO[bytes]) -> BuildError:
    """Why a child ended without a last message. `memory` is its last known memory, in bytes."""
    if status == -9:  # SIGKILL, a name that not every system has
        return OutOfMemory(
            f"The build was killed at {format_bytes(memory)} of memory, probably because memory was full: "
            f"{REDUCE}, close other programs, or build on a machine with more memory."
        )
    stderr.seek(0)
    last = " | ".join(stderr.read().decode(errors="replace").splitlines()[-5:]) or "it printed nothing"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return BuildError(f"The process that builds the engine {how}: {last}. Build again; if this recurs, report it.")


@dataclass(eq=False, slots=True)
class _Phase:
    name: str
    steps: int
    stage: Stage
    stack: ExitStack  # closes `stage`
    finished: bool = False


class _Phases:
    """TensorRT's phases as nested stages. One that finishes before a phase inside it closes with that phase."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: list[_Phase] = []

    def follow(self, message: PhaseStarted | PhaseAdvanced | PhaseFinished) -> None:
        match message:
            case PhaseStarted(name, steps):
                stack = ExitStack()
                stage = stack.enter_context(self._progress.stage(name))
                stage.update(0, steps)
                self._open.append(_Phase(name, steps, stage, stack))
            case PhaseAdvanced(name, done):
                for phase in self._named(name):
                    phase.stage.update(done, phase.steps)
            case PhaseFinished(name):
                for phase in self._named(name):
                    phase.finished = True
                self._close_finished()

    def _named(self, name: str) -> list[_Phase]:
        """The phase of that name, if it is open: TensorRT opens one at a time."""
        return [phase for phase in self._open if phase.name == name and not phase.finished]

    def _close_finished(self) -> None:
        while self._open and self._open[-1].finished:
            self._open.pop().stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.pop().stack.__exit__(kind, error, trace)
