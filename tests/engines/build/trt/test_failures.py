"""Builds that fail on the way."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from engines.build.trt.disk import write_engine
from engines.build.trt.errors import BuildError, NotWritten, OutOfMemory, Unavailable
from engines.build.trt.log import is_out_of_memory
from engines.build.trt.parent import build_engine
from engines.progress import NullProgress
from tests.engines.build.trt.block import MANY, rows
from tests.engines.build.trt.builds import PRETENDED, RTX, Recorder, alive, pretend


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        ("raise TypeError('factory function returned nullptr')", Unavailable, "does not start"),
        ("raise MemoryError", OutOfMemory, r"ran out of memory at [\d.]+ MB: use fewer --resolution, --rows"),
        ("raise ValueError('a new fault')", BuildError, "exit status 1: .*ValueError: a new fault"),
        ("print('from C', flush=True); import os; os._exit(3)", BuildError, "exit status 3: from C. Build again"),
    ],
)
def test_a_failure_of_the_child_is_reported(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, kind: type[BuildError], message: str
) -> None:
    pretend(monkeypatch, tmp_path, RTX, f"{PRETENDED}        {action}\n")
    with pytest.raises(kind, match=message):
        build_engine(RTX, graph, tmp_path / "it.engine", [rows(1)], progress=NullProgress())
    assert not list(tmp_path.glob("*.engine*"))


@pytest.mark.parametrize(
    "words", ["Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "std::bad_alloc", "out of memory"]
)
def test_messages_of_tensorrt_about_full_memory_are_recognised(words: str) -> None:
    assert is_out_of_memory(f"[virtualMemoryBuffer.cpp::resizePhysical::172] {words}")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGKILL, OutOfMemory, r"killed at \d+\.\d [MG]B of memory.*use fewer --resolution"),
        (signal.SIGSEGV, BuildError, "was ended by SIGSEGV: it printed nothing. Build again"),
        (signal.SIGTERM, BuildError, "stopped by a signal: start it again"),
    ],
)
def test_a_child_killed_by_a_signal_leaves_nothing(
    graph: Path, tmp_path: Path, child: list[int], number: signal.Signals, kind: type[BuildError], message: str
) -> None:
    def kill(name: str) -> None:
        if name == "Computing profile costs":
            os.kill(child[0], number)

    with pytest.raises(kind, match=message):
        build_engine(RTX, graph, tmp_path / "it.engine", MANY, progress=Recorder(kill))
    assert list(tmp_path.iterdir()) == []
    assert not alive(child[0])


def test_a_folder_that_cannot_be_written_is_reported_before_the_build(graph: Path, tmp_path: Path) -> None:
    progress = Recorder()
    with pytest.raises(NotWritten, match=r"No such file or directory\. Choose another --out"):
        build_engine(RTX, graph, tmp_path / "nowhere" / "it.engine", [rows(1)], progress=progress)
    assert progress.stages == []


def test_a_file_that_may_not_grow_leaves_the_older_engine(graph: Path, tmp_path: Path, child: list[int]) -> None:
    out = tmp_path / "it.engine"
    out.write_bytes(b"an older engine")

    def limit(name: str) -> None:
        if name == "Building engine":
            resource.prlimit(child[0], resource.RLIMIT_FSIZE, (100_000, 100_000))

    with pytest.raises(NotWritten, match=r"no space for .*it takes \d+\.\d MB, .* are free. Free some space"):
        build_engine(RTX, graph, out, [rows(1)], progress=Recorder(limit))
    assert out.read_bytes() == b"an older engine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_reported_with_the_size_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten, match=r"\(No space left on device\): it takes 3.0 MB"):
        write_engine(bytes(3_000_000), tmp_path / "it.engine", tmp_path / "temporary")
    assert not (tmp_path / "it.engine").exists()
