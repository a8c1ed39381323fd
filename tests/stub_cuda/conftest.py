"""The real package onnxruntime-gpu over stub libraries of CUDA, each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.stub_cuda.libraries import CUDART, compile_libraries, compiler
from tests.stub_cuda.report import Report
from tests.stub_cuda.worker import Task, as_json

WHEEL = ROOT / "build" / "onnxruntime-gpu"


@dataclass(frozen=True)
class Stub:
    """Where the package and the stub libraries are."""

    libraries: Path
    folder: Path  # for files of each run

    def environment(self, *paths: Path) -> dict[str, str]:
        """The variables of a process that finds the package, `paths` and the driver."""
        found = os.pathsep.join(map(str, (WHEEL, *paths)))
        return {**os.environ, "PYTHONPATH": found, "LD_LIBRARY_PATH": str(self.libraries / "driver")}

    def run(self, **fields: Any) -> Report:
        """Run a task of the worker."""
        record, result, task = (self.folder / name for name in ("record.jsonl", "result.json", "task.json"))
        record.unlink(missing_ok=True)
        task.write_text(as_json(Task(result=str(result), cudart=str(self.libraries / CUDART), **fields)))
        self.python("-m", "tests.stub_cuda.worker", str(task), STUB_CUDA_RECORD=str(record))
        return Report.read(record, result)

    def python(self, *arguments: str, **variables: str) -> str:
        """What Python prints in that environment."""
        ended = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, *arguments],
            env=self.environment(self.libraries) | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return ended.stdout


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stub libraries."""
    if compiler() is None:
        pytest.skip("there is no C compiler: cc")
    if not (WHEEL / "onnxruntime").is_dir():
        pytest.skip("onnxruntime-gpu is not there: scripts/onnxruntime-gpu downloads it")
    folder = tmp_path_factory.mktemp("stub")
    compile_libraries(folder)
    return folder


@pytest.fixture
def stub(libraries: Path, tmp_path: Path) -> Stub:
    return Stub(libraries, tmp_path)


@pytest.fixture(scope="session")
def runs(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """Runs of the worker, each done once."""
    done: dict[tuple[tuple[str, Any], ...], Report] = {}

    def run(**fields: Any) -> Report:
        key = tuple(sorted(fields.items()))
        if key not in done:
            done[key] = Stub(libraries, tmp_path_factory.mktemp("run")).run(**fields)
        return done[key]

    return run
