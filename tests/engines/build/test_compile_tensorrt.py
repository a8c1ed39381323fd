"""What of a TensorRT build is recorded and shown: its level, its time, and what earlier timings spared it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import build_engines
from engines.build import compile as compiling
from engines.build.compile import EngineOptions, compile_backend
from engines.build.tables import summary_table
from engines.build.trt.messages import EngineReport
from engines.manifest import Build, Gpu, Manifest
from engines.progress import NullProgress


class Builds:
    """In the place of the builder, which needs a GPU."""

    def __init__(self) -> None:
        self.levels: list[int | None] = []

    def __call__(self, module: str, onnx: Path, out: Path, profiles: Sequence[Any], **options: Any) -> EngineReport:
        assert (module, onnx.suffix, bool(profiles)) == ("tensorrt", ".onnx", True)
        out.write_bytes(b"engine")
        level = options["optimization_level"]
        self.levels.append(level)
        return EngineReport(layers=None, seconds=40, memory=0, activations=None, reused_timings=level * 100)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    builds = Builds()
    monkeypatch.setattr(compiling, "build_engine", builds)
    monkeypatch.setattr(compiling, "installed", lambda _: "11.4.0")
    monkeypatch.setattr(compiling, "gpu_here", lambda: Gpu(name="Fake", compute_capability="8.9"))
    return builds


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def compiled(manifest: Manifest, folder: Path, level: int | None = None) -> Build:
    options = EngineOptions("fp32", level)
    return compile_backend(manifest, folder, "tensorrt", options, progress=NullProgress())


def test_the_level_is_recorded_and_another_one_compiles_again(manifest: Manifest, folder: Path, builds: Builds) -> None:
    first = compiled(manifest, folder)
    assert {engine.optimization_level for engine in first.engines.values()} == {3}
    compiled(manifest, folder, 3)
    assert set(builds.levels) == {3}
    assert len(builds.levels) == len(first.engines)  # level 3 is what was there
    second = compiled(manifest, folder, 5)
    assert {engine.reused_timings for engine in second.engines.values()} == {500}
    assert builds.levels[len(first.engines) :] == [5] * len(first.engines)


def test_the_table_shows_what_each_build_took_and_all_together(
    manifest: Manifest, folder: Path, builds: Builds
) -> None:
    build = compiled(manifest, folder, 4)
    shown = manifest.model_copy(update={"builds": {"tensorrt": build}})
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(shown, "tensorrt"))
    assert "40.0 s, level 4, 400 timings reused" in capture.get()
    assert f"built in {40 * len(builds.levels)} s; not yet verified" in capture.get()


def test_a_level_without_tensorrt_is_an_error_before_anything_is_compiled(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compile", str(bundle), "--backend", "tensorrt_rtx", "--optimization-level", "5"]
    assert build_engines.main(words) == 1
    said = capsys.readouterr()
    assert "--optimization-level is of --backend tensorrt alone" in said.out + said.err


@pytest.mark.parametrize("level", ["6", "-1", "best"])
def test_levels_are_tensorrts(bundle: Path, level: str) -> None:
    with pytest.raises(SystemExit) as ended:
        build_engines.main(["compile", str(bundle), "--optimization-level", level])
    assert ended.value.code == 2
