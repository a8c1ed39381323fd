"""An ONNX graph and its engine, and the processes that a test starts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from engines.build.trt.parent import build_engine
from tests.engines.build.trt.block import draw, rows
from tests.engines.build.trt.builds import RTX, Built, Recorder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("graph") / "block.onnx")


@pytest.fixture(scope="module")
def built(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The graph as an engine with two profiles, in the place of an older one."""
    out, progress = tmp_path_factory.mktemp("engines") / "block.engine", Recorder()
    out.write_bytes(b"an older engine")
    return Built(build_engine(RTX, graph, out, [rows(2), rows(4)], progress=progress), progress, out)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of the processes that the test starts."""
    started: list[int] = []
    start = subprocess.Popen.__init__

    def started_one(self: subprocess.Popen[Any], *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        started.append(self.pid)

    monkeypatch.setattr(subprocess.Popen, "__init__", started_one)
    return started
