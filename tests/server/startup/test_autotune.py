"""`--backend auto` measures what runs on this CPU, takes the fastest, and remembers it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engines.backends import available, cores
from engines.backends.cuda import Probe
from engines.errors import EngineError
from engines.manifest import Gpu, Manifest, Size
from server.startup import autotune
from server.startup.autotune import MeasuringStopped
from server.startup.candidates import candidate_backends
from server.startup.settings import ServerSettings
from tests.support.serving import Serving

CONTENDERS = ("openvino", "onnxruntime")
GPU = Probe(Gpu(name="NVIDIA L4", compute_capability="8.9"))
NONE = Probe(None, "no driver")


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "latentd"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends were measured; each takes as many seconds as its name has letters."""
    seen: list[str] = []

    def asked(_bundle: Path, backend: str, *, threads: int, stopped: Callable[[], bool]) -> float:  # noqa: ARG001
        seen.append(backend)
        return float(len(backend))

    monkeypatch.setattr(autotune, "_measure_in_process", asked)
    return seen


def ignore(_status: str) -> None: ...


def found(manifest: Manifest, *backends: str, threads: int = 1) -> str:
    return autotune.choose_fastest(manifest, Path(), backends or CONTENDERS, threads=threads, on_status=ignore)


# --- a server that does


def test_a_server_measures_once_and_remembers(bundle: Path, manifest: Manifest, caches: Path) -> None:
    """What the first start writes down is what later ones go by. Where this machine is busy, it writes down nothing."""
    note = autotune._cache_file(autotune._key(manifest, CONTENDERS, 1))
    assert note
    with Serving(bundle, "--backend", "auto") as serving:
        (model,) = serving.client.get("/models").json()
        assert serving.generate(prompt="a red cat", num_inference_steps=2).status_code == 200
    (line,) = [line for line in serving.stderr if "measured on this machine" in line]
    assert f"backend {model['backend']}: an image takes openvino " in line
    assert f"remembered in {note}" in line if note.exists() else "two rounds disagree" in line
    assert note.parent == caches
    caches.mkdir(parents=True, exist_ok=True)
    for backend in CONTENDERS:
        note.write_text(json.dumps(dict.fromkeys(CONTENDERS, 5) | {backend: 1}))
        with Serving(bundle, "--backend", "auto") as serving:
            assert serving.client.get("/models").json()[0]["backend"] == backend


def test_who_names_a_backend_measures_nothing(serving: Serving) -> None:
    assert not [line for line in serving.stderr if "measured" in line]


def test_who_is_stopped_while_measuring_leaves_no_process(bundle: Path, manifest: Manifest, caches: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(MeasuringStopped):
        autotune.choose_fastest(manifest, bundle, CONTENDERS, threads=1, on_status=ignore, stopped=lambda: True)
    assert not caches.exists()
    assert psutil.Process().children() == before


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_a_server_that_ends_while_it_measures_takes_its_child_along(
    bundle: Path, caches: Path, how: signal.Signals, code: int
) -> None:
    """As Ctrl-C does, which a terminal sends to every process of the group."""
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", "0", "--backend", "auto"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:  # noqa: S603 - our own command
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, how)
        assert process.stderr
        output = process.stderr.read()
        assert process.wait(60) == code
        assert "Traceback" not in output
        assert "is passed over" not in output
        assert not psutil.wait_procs(children, timeout=120)[1]
    assert not caches.exists()


def test_what_crashes_is_passed_over_and_asked_again_next_time(
    manifest: Manifest, bundle: Path, caches: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = autotune._measure_in_process

    def crashing(bundle: Path, backend: str, *, threads: int, stopped: Callable[[], bool]) -> float:
        with monkeypatch.context() as patched:
            if backend == "openvino":
                patched.setattr(sys, "executable", "/bin/false")
            return asked(bundle, backend, threads=threads, stopped=stopped)

    monkeypatch.setattr(autotune, "_measure_in_process", crashing)
    assert autotune.choose_fastest(manifest, bundle, CONTENDERS, threads=1, on_status=ignore) == "onnxruntime"
    assert "openvino is passed over: its process ended with 1" in caplog.text
    assert not caches.exists()


def test_where_nothing_runs_each_reason_is_said(manifest: Manifest, tmp_path: Path, caches: Path) -> None:
    with pytest.raises(EngineError, match=r"openvino: .*holds no manifest\.json.*; onnxruntime: "):
        autotune.choose_fastest(manifest, tmp_path, CONTENDERS, threads=1, on_status=ignore)
    assert not caches.exists()


# --- what is remembered


def test_of_what_is_observed_the_shortest_counts() -> None:
    step_times = autotune._Shortest(max_rows=2)
    size = Size(width=64, height=64)
    for seconds in (3, 1, 2):
        step_times.observe((size, "full"), 2, seconds)
        step_times.observe((size, "shallow"), 2, seconds / 10)
        step_times.observe_encode_decode(size, seconds * 2)
        step_times.observe_encode_decode(size, seconds / 10, decoder="fast")
    assert (step_times.step, step_times.end) == (1, 2)


def test_another_machine_model_or_setting_is_measured_anew(
    manifest: Manifest, caches: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measures(count: int, **options: int) -> None:
        measured.clear()
        assert found(manifest, **options) == "openvino"
        assert len(measured) == count

    measures(4)
    measures(0)
    measures(4, threads=2)
    manifest = manifest.model_copy(update={"export_key": "another"})
    measures(4)
    monkeypatch.setattr(autotune, "installed", lambda _backend: "another")
    measures(4)
    monkeypatch.setattr(cores, "name", lambda: "another")
    measures(4)
    assert len(list(caches.iterdir())) == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"7", b'{"openvino": 1}', b'{"openvino": "x", "onnxruntime": 1}']
    + [b'{"openvino": %s, "onnxruntime": 1}' % wrong for wrong in (b"0", b"-1", b"NaN", b"null", b"[1]")],
)
def test_a_file_that_we_did_not_write_is_measured_over(
    manifest: Manifest, caches: Path, measured: list[str], content: bytes
) -> None:
    found(manifest)
    (note,) = caches.iterdir()
    note.write_bytes(content)
    assert found(manifest) == "openvino"
    assert len(measured) == 8
    assert json.loads(note.read_bytes()) == {"openvino": 8, "onnxruntime": 11}


def test_where_nothing_can_be_written_every_start_measures(
    manifest: Manifest, caches: Path, measured: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    caches.parent.write_text("a file where the folder would be")
    for count in (4, 8):
        assert found(manifest) == "openvino"
        assert len(measured) == count
    assert "not remembered (Not a directory" in caplog.text


def test_each_is_measured_twice_and_the_shorter_time_counts(
    manifest: Manifest, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = take(monkeypatch, openvino=[3, 5], onnxruntime=[4, 6])
    assert found(manifest) == "openvino"
    assert seen == ["openvino", "onnxruntime", "onnxruntime", "openvino"]
    (note,) = caches.iterdir()
    assert json.loads(note.read_bytes()) == {"openvino": 3, "onnxruntime": 4}


def test_what_two_rounds_disagree_about_is_measured_again_next_time(
    manifest: Manifest, caches: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    take(monkeypatch, openvino=[9, 3], onnxruntime=[4, 4])
    assert found(manifest) == "openvino"
    assert "not remembered (two rounds disagree" in caplog.text
    assert not caches.exists()


def take(monkeypatch: pytest.MonkeyPatch, **seconds: list[float]) -> list[str]:
    """Let each backend take these seconds, one after the other; returns who was asked."""
    seen: list[str] = []

    def asked(_bundle: Path, backend: str, *, threads: int, stopped: Callable[[], bool]) -> float:  # noqa: ARG001
        seen.append(backend)
        return seconds[backend].pop(0)

    monkeypatch.setattr(autotune, "_measure_in_process", asked)
    return seen


# --- who comes into question


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What the server chooses among, for a bundle with `builds`, where `packages` are installed."""

    def contenders(
        manifest: Manifest, *builds: str, backend: str | None = None, gpu: Probe = NONE, compiles: bool = False
    ) -> list[str]:
        monkeypatch.setattr(available, "installed", lambda _backend: "1.0")
        monkeypatch.setattr(available, "probe", lambda: gpu)
        (build,) = manifest.builds.values()
        built = manifest.model_copy(update={"builds": dict.fromkeys(builds, build)})
        return list(candidate_backends(ServerSettings(backend=backend, compile=compiles), built))

    return contenders


Contenders = Callable[..., list[str]]
BOTH = list(CONTENDERS)


def test_what_is_named_is_taken(contenders: Contenders, manifest: Manifest) -> None:
    assert contenders(manifest, "openvino", backend="onnxruntime") == ["onnxruntime"]
    assert contenders(manifest, backend="tensorrt") == ["tensorrt"]


def test_a_bundle_that_was_built_for_a_backend_decides(contenders: Contenders, manifest: Manifest) -> None:
    assert contenders(manifest, "onnxruntime", "openvino") == ["onnxruntime"]
    assert contenders(manifest, "openvino", gpu=GPU) == ["openvino"]
    assert contenders(manifest, "tensorrt", "openvino", gpu=GPU) == ["tensorrt"]
    assert contenders(manifest, "tensorrt", "onnxruntime") == ["onnxruntime"]


def test_measured_is_where_the_bundle_decides_nothing_or_that_is_asked(
    contenders: Contenders, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    assert contenders(manifest) == BOTH
    assert contenders(manifest, "onnxruntime", backend="auto") == BOTH
    assert not caplog.text
    assert contenders(manifest, compiles=True) == BOTH
    assert contenders(manifest, "tensorrt") == BOTH
    assert "backend tensorrt is unavailable (tensorrt: no driver; openvino: available)" in caplog.text


def test_a_gpu_is_not_measured(contenders: Contenders, manifest: Manifest) -> None:
    assert contenders(manifest, "onnxruntime", "tensorrt", backend="auto", gpu=GPU) == ["tensorrt"]
    assert contenders(manifest, compiles=True, gpu=GPU) == ["tensorrt"]
    assert contenders(manifest, "onnxruntime", backend="auto", gpu=GPU) == BOTH


def test_one_alone_is_not_measured(manifest: Manifest, measured: list[str]) -> None:
    assert found(manifest, "onnxruntime") == "onnxruntime"
    assert not measured
