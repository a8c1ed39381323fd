"""What a bundle lacks is compiled at the start: by real builds, for TensorRT for RTX, and by scripted ones."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from engines.backends.cuda import probe
from engines.backends.registry import install_command
from engines.contract import GRAPHS
from engines.errors import EngineError
from engines.manifest import Manifest
from server.startup import compiling
from server.startup.compiling import CompilingStopped, compile_missing

RTX = "tensorrt_rtx"
STARTED = "compiling encode_prompt for tensorrt_rtx, 1 of 5 engines"
WAITS = "import os\nprint(os.getpid(), file=open('pid', 'w'), flush=True)\nwhile os.read(0, 1): pass\n"

# A server as far as this goes: compiles the bundle it is given, and prints what it is told.
SERVER = (
    "import sys; from pathlib import Path; from engines.manifest import Manifest\n"
    "from server.startup.compiling import compile_missing\n"
    "bundle = Path(sys.argv[1])\n"
    f"compile_missing(Manifest.load(bundle), bundle, {RTX!r}, on_status=lambda text: print(text, flush=True))\n"
)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one size and one row bucket, which takes seconds to compile."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = Manifest.load(copy)
    manifest.model_copy(update={"resolutions": manifest.resolutions[:1], "rows": manifest.rows[:1]}).save(copy)
    return copy


@pytest.fixture
def manifest_of_copy(copied: Path) -> Manifest:
    return Manifest.load(copied)


def script_build(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `python -m build_engines` run `text`, in `folder`."""
    (folder / "scripted").mkdir()
    (folder / "scripted" / "build_engines.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder / "scripted")
    monkeypatch.chdir(folder)


@contextmanager
def server(bundle: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(bundle)]
    with subprocess.Popen(  # noqa: S603 - our own command
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_gone(processes: list[psutil.Process], *, seconds: float = 120) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


def test_engines_are_compiled_once_and_told_of(copied: Path, manifest_of_copy: Manifest) -> None:
    output: list[str] = []
    made = compile_missing(manifest_of_copy, copied, RTX, on_status=output.append)
    assert made == Manifest.load(copied)
    assert set(made.builds) == {"onnxruntime", RTX}
    assert {engine.precision for engine in made.builds[RTX].engines.values()} == {"fp32"}  # all that the bundle holds
    assert output[0] == STARTED
    for position, graph in enumerate(GRAPHS, start=1):
        of_graph = [text for text in output if text.startswith(f"compiling {graph} for {RTX}, {position} of 5 engines")]
        percents = [int(text.split()[-2]) for text in of_graph if text.endswith("%")]
        assert percents
        assert percents == sorted(percents)
        assert 0 <= percents[0] <= percents[-1] <= 100
    output.clear()
    if probe().gpu is None:  # where there is one, whether they fit it is another question
        assert compile_missing(made, copied, RTX, on_status=output.append) is made
        assert not output


def test_two_that_start_at_once_compile_once(copied: Path) -> None:
    with server(copied) as one, server(copied) as other:
        said = [process.communicate(timeout=300)[0].splitlines() for process in (one, other)]
        assert [process.returncode for process in (one, other)] == [0, 0], said
    assert sum(STARTED in lines for lines in said) == 1
    waited = next(lines for lines in said if STARTED not in lines)
    assert set(waited) <= {"waiting for another server that compiles this bundle"}
    assert RTX in Manifest.load(copied).builds


def test_a_killed_server_takes_its_build_along_and_the_next_one_goes_on(copied: Path) -> None:
    with server(copied) as process:
        assert process.stdout
        assert process.stdout.readline().strip() == STARTED
        assert "encode_prompt" in process.stdout.readline()  # it is well under way
        builders = psutil.Process(process.pid).children(recursive=True)
        assert builders
        process.send_signal(signal.SIGKILL)
        wait_until_gone(builders)
    made = compile_missing(Manifest.load(copied), copied, RTX, on_status=lambda _: None)
    assert RTX in made.builds
    assert not [path for path in copied.rglob("*") if path.name.endswith(".tmp")]


def test_a_stop_ends_the_build(
    copied: Path, manifest_of_copy: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_build(WAITS, tmp_path, monkeypatch)
    started = tmp_path / "pid"
    with pytest.raises(CompilingStopped):
        compile_missing(
            manifest_of_copy,
            copied,
            RTX,
            on_status=lambda _: None,
            stopped=lambda: started.exists() and bool(started.read_text()),
        )
    assert not psutil.pid_exists(int(started.read_text()))


def test_a_build_that_does_not_end_is_killed(
    copied: Path, manifest_of_copy: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_build(WAITS + "import time\ntime.sleep(600)", tmp_path, monkeypatch)
    monkeypatch.setattr(compiling, "_GRACE", 0.1)
    started = tmp_path / "pid"
    with pytest.raises(CompilingStopped):
        compile_missing(
            manifest_of_copy,
            copied,
            RTX,
            on_status=lambda _: None,
            stopped=lambda: started.exists() and bool(started.read_text()),
        )
    assert not psutil.pid_exists(int(started.read_text()))


def test_who_waits_for_another_can_be_stopped(copied: Path, manifest_of_copy: Manifest) -> None:
    output: list[str] = []
    with (copied / ".compiling").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CompilingStopped):
            compile_missing(manifest_of_copy, copied, RTX, on_status=output.append, stopped=lambda: bool(output))
    assert output == ["waiting for another server that compiles this bundle"]


def test_a_build_holds_the_bundle_as_long_as_it_lives(
    copied: Path, manifest_of_copy: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the server be killed, its build may still write for a moment."""
    code = (
        "from pathlib import Path\n"
        "if any(fd.resolve().name == '.compiling' for fd in Path('/proc/self/fd').iterdir()):\n"
        "    raise SystemExit('error: it is held')\n"
    )
    script_build(code, tmp_path, monkeypatch)
    with pytest.raises(EngineError, match="it is held"):
        compile_missing(manifest_of_copy, copied, RTX, on_status=lambda _: None)


def test_a_real_failure_is_told_in_the_build_s_own_words(copied: Path, manifest_of_copy: Manifest) -> None:
    """TensorRT compiles on a GPU alone; and this environment has it on none."""
    if probe().gpu is not None:
        pytest.skip("a GPU is here")
    with pytest.raises(EngineError, match=r"^The tensorrt engines were not compiled\. .*(\[cuda\]|GPU)"):
        compile_missing(manifest_of_copy, copied, "tensorrt", on_status=lambda _: None)
    assert Manifest.load(copied) == manifest_of_copy


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('noise'); print('error: no room on the disk: make some.'); raise SystemExit(1)", r"\. no room on the"),
        ("raise RuntimeError('a bug')", "status 1: .*RuntimeError: a bug"),
        ("raise SystemExit(3)", "status 3: without a word"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9, as happens where memory runs out"),
    ],
)
def test_the_last_words_of_a_build(
    script: str,
    words: str,
    copied: Path,
    manifest_of_copy: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script_build(script, tmp_path, monkeypatch)
    with pytest.raises(EngineError, match=words):
        compile_missing(manifest_of_copy, copied, RTX, on_status=lambda _: None)


def test_engines_for_another_gpu_are_compiled_anew(
    copied: Path, manifest_of_copy: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("built for another GPU")

    elsewhere = manifest_of_copy.model_copy(update={"builds": {RTX: manifest_of_copy.builds["onnxruntime"]}})
    elsewhere.save(copied)
    monkeypatch.setattr(compiling, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(compiling, "check_fits", refuse)
    script_build("print('{\"note\": \"as asked\"}'); open('ran', 'w')", tmp_path, monkeypatch)
    compile_missing(elsewhere, copied, RTX, on_status=lambda _: None)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_cpus_load_the_graphs_as_they_are(backend: str, manifest: Manifest, tmp_path: Path) -> None:
    assert compile_missing(manifest, tmp_path / "unread", backend, on_status=lambda _: None) is manifest


def test_a_bundle_that_cannot_be_written_says_what_to_do(copied: Path, manifest_of_copy: Manifest) -> None:
    (copied / ".compiling").mkdir()  # read-only folders do not stop root, who runs many a test
    with pytest.raises(EngineError, match=r"let the server write to it, or first run .*build_engines"):
        compile_missing(manifest_of_copy, copied, RTX, on_status=lambda _: None)


def test_compiling_needs_its_extra(copied: Path, manifest_of_copy: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match=re.escape(install_command("compile"))):
        compile_missing(manifest_of_copy, copied, RTX, on_status=lambda _: None)
