"""Builds an engine in a process of its own: a failed TensorRT build can spoil the next one in the same process.

`build_engine` starts `engines.build.trt.child`, sends it the job as JSON, and reads a JSON line for every event.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from engines.backends.registry import TENSORRT
from engines.build.trt.disk import remove
from engines.build.trt.errors import KINDS, REDUCE, BuildError, OutOfMemory, Unavailable, format_bytes
from engines.build.trt.layers import LayerCounts
from engines.files import temporary_for
from engines.progress import Progress, Stage

_GRACE = 3.0  # seconds in which a cancelled build may end by itself

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]  # by input: smallest, optimal, largest


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How a build went. What neither TensorRT's log nor the loaded engine told is None."""

    layers: LayerCounts | None
    seconds: float  # of compiling
    memory: int  # bytes of main memory at the peak; 0 where the system does not tell
    activations: tuple[int, ...] | None  # bytes of device memory by profile


def build_engine(module: str, onnx: Path, out: Path, profiles: Sequence[Ranges], *, progress: Progress) -> EngineReport:
    """Compile the graph at `onnx` to `out`, optimised for `profiles` in their order, with "tensorrt" or "tensorrt_rtx".

    `out` is replaced when the engine is whole and on disk; otherwise it stays what it was.

    Raises:
        BuildError: one of its kinds says what is missing: the package, a GPU, an operator, memory, room on disk.
        KeyboardInterrupt: the build was cancelled; its process has ended.
    """
    if module not in TENSORRT:
        raise Unavailable(f"There is no TensorRT called {module!r}: choose one of {', '.join(TENSORRT)}.")
    beside = temporary_for(out)
    paths = {"onnx": str(onnx), "out": str(out), "beside": str(beside)}
    job = {"module": module, **paths, "profiles": [dict(profile) for profile in profiles]}
    try:
        with tempfile.TemporaryFile() as stderr, _running(job, stderr) as child:
            return _follow(child, stderr, progress)
    finally:
        remove(beside)


@contextmanager
def _running(job: Mapping[str, Any], stderr: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The building process, at work on `job`. It does not outlive the context."""
    # It imports what we import, from where we do, and nothing from the folder that it happens to be started in.
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
            json.dump(job, child.stdin)
        yield child
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    """Let the child cancel its build, and kill it if that takes longer than the grace."""
    assert child.stdout  # noqa: S101 - piped in _running
    child.stdout.close()  # so that it is not stuck telling us something
    child.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:
        child.kill()
        child.wait()


def _follow(child: subprocess.Popen[str], stderr: IO[bytes], progress: Progress) -> EngineReport:
    """Pass on what the child tells until it reports or fails."""
    memory = 0
    with _Phases(progress) as phases:
        for said in _heard(child):
            match said:
                case {"memory": now}:
                    memory = now
                case {"note": text}:
                    progress.note(text)
                case {"error": kind, "message": message}:
                    raise KINDS[kind](message)
                case {"report": facts}:
                    return _report(facts)
                case _:
                    phases.hear(said)
    raise _unexpected_end(child.wait(), memory, stderr)


def _heard(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert child.stdout  # noqa: S101 - piped in _running
    for line in child.stdout:
        if line.endswith("\n"):  # a killed child may leave half a line
            yield json.loads(line)


def _report(facts: dict[str, Any]) -> EngineReport:
    activations = facts.pop("activations")
    return EngineReport(**facts, activations=None if activations is None else tuple(activations))


def _unexpected_end(status: int, memory: int, stderr: IO[bytes]) -> BuildError:
    """Why a child ended without a word. `memory` is what it was last known to take, in bytes."""
    if status == -9:  # SIGKILL, which only some systems know by name
        return OutOfMemory(
            f"The build was killed when it took {format_bytes(memory)} of memory, as happens when there is no more: "
            f"{REDUCE}, close other programs, or build on a machine with more memory."
        )
    stderr.seek(0)
    last = " | ".join(stderr.read().decode(errors="replace").splitlines()[-5:]) or "it said nothing"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return BuildError(f"The process that builds the engine {how}: {last}. Build again; if it recurs, report this.")


@dataclass(eq=False, slots=True)
class _Phase:
    name: str
    total: int
    stage: Stage
    ending: ExitStack
    finished: bool = False


class _Phases:
    """TensorRT's phases as nested stages. A phase that finishes before one begun within it ends when that one does."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: list[_Phase] = []

    def hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"start": name, "total": total}:
                ending = ExitStack()
                stage = ending.enter_context(self._progress.stage(name))
                stage.update(0, total)
                self._open.append(_Phase(name, total, stage, ending))
            case {"step": name, "done": done}:
                for phase in self._named(name):
                    phase.stage.update(done, phase.total)
            case {"finish": name}:
                for phase in self._named(name):
                    phase.finished = True
                self._close_finished()

    def _named(self, name: str) -> list[_Phase]:
        """The phase of that name: TensorRT has one at a time."""
        return [phase for phase in self._open if phase.name == name and not phase.finished]

    def _close_finished(self) -> None:
        while self._open and self._open[-1].finished:
            self._open.pop().ending.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.pop().ending.__exit__(kind, error, trace)
