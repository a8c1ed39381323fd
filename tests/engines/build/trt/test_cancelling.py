"""A build that is cancelled, by its caller or because the caller ended, leaves no process and no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from engines.build.trt import parent
from engines.build.trt.messages import BuildJob, BuildWarning
from engines.build.trt.parent import build_engine
from engines.progress import NullProgress
from tests import ROOT
from tests.engines.build.trt.block import MANY
from tests.engines.build.trt.builds import PRETENDED, RTX, Recorder, alive, pretend, soon


def test_an_interrupt_ends_the_child_and_leaves_the_older_engine(graph: Path, tmp_path: Path, child: list[int]) -> None:
    def interrupt(name: str) -> None:
        if name == "Computing profile costs":
            raise KeyboardInterrupt

    out, progress = tmp_path / "block.engine", Recorder(interrupt)
    out.write_bytes(b"an older engine")
    with pytest.raises(KeyboardInterrupt):
        build_engine(RTX, graph, out, MANY, progress=progress)
    assert all(stage.ended for stage in progress.stages)
    assert out.read_bytes() == b"an older engine"
    assert list(tmp_path.iterdir()) == [out]
    assert not alive(child[0])


def test_a_build_that_does_not_respond_is_killed(
    graph: Path, tmp_path: Path, child: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, RTX, PRETENDED + "    def create_network(self, flags): time.sleep(60)\n")
    monkeypatch.setattr(parent, "_GRACE", 0.2)

    class Interrupting(NullProgress):
        def note(self, text: str) -> None:
            assert text == "ready"
            raise KeyboardInterrupt

    out = tmp_path / "block.engine"
    with pytest.raises(KeyboardInterrupt):
        build_engine(RTX, graph, out, MANY, progress=Interrupting())
    assert not alive(child[0])
    assert not list(tmp_path.glob("*.engine*"))


def test_a_build_that_does_not_respond_ends_itself_once_the_pipe_is_closed(
    graph: Path, tmp_path: Path, child: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, RTX, PRETENDED + "    def create_network(self, flags): time.sleep(60)\n")
    out, temporary = tmp_path / "it.engine", tmp_path / "temporary"
    job = BuildJob(module=RTX, onnx=str(graph), out=str(out), temporary=str(temporary), profiles=[])
    with TemporaryFile() as stderr, parent._running(job, stderr) as alone:
        assert BuildWarning("ready") in islice(parent._messages(alone), 5)
        assert temporary.exists()
        assert alone.stdout
        alone.stdout.close()
        assert soon(lambda: not alive(child[0]))
        assert alone.wait() == 1
    assert not temporary.exists()


CALLER = """
import subprocess, sys, time
from pathlib import Path
from engines.progress import NullProgress
from engines.build.trt.messages import BuildJob, BuildWarning
from engines.build.trt.parent import build_engine

class Telling(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)

class Progress(NullProgress):
    def stage(self, name):
        if name == "Computing profile costs":
            print("building", flush=True)
        return super().stage(name)

subprocess.Popen = Telling
shape = lambda rows: (rows, 4, 8, 8)
profiles = [{"x": (shape(1), shape(rows), shape(rows))} for rows in range(1, 13)]
build_engine("tensorrt_rtx", Path(sys.argv[1]), Path(sys.argv[2]), profiles, progress=Progress())
"""


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGKILL, False)]
)
def test_nothing_outlives_a_caller_that_is_interrupted_or_killed(
    graph: Path, tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    here = ROOT
    caller = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-c", CALLER, graph, tmp_path / "block.engine"],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with caller:
        assert caller.stdout
        builder = int(caller.stdout.readline())
        assert caller.stdout.readline() == "building\n"
        os.killpg(caller.pid, number) if whole_group else caller.send_signal(number)
        _, said = caller.communicate(timeout=20)
    assert caller.returncode == -number
    assert "KeyboardInterrupt" in said or number is signal.SIGKILL
    assert soon(lambda: not alive(builder))
    assert list(tmp_path.iterdir()) == []
