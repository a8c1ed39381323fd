"""Where the memory goes: the real server's engines, and a folder without a bundle."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.server import memory
from benchmarks.server.memory import MemoryReport
from engines.contract import GRAPHS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_engine_has_a_sample(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    assert memory.main(["--out", str(out), "--backend", backend, "--steps", "2"]) == 0
    found = MemoryReport.model_validate_json(out.read_bytes())
    first, *loaded, warmed_up, drawn = found.moments
    assert sorted(moment.done for moment in loaded) == sorted(GRAPHS)
    assert loaded[0].done == "denoise"  # the largest, while nothing else is there
    assert all(moment.files > 0 for moment in loaded)
    assert all(moment.peak >= moment.own for moment in found.moments)
    assert any(after.own > before.own for before, after in pairwise([first, *loaded]))
    assert (first.files, warmed_up.files, drawn.done) == (0, 0, "an image of 64x64")
    assert found.peak == max(moment.peak for moment in found.moments)
    assert "at the peak" in capsys.readouterr().out


def test_a_folder_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--out", str(tmp_path / "none.json"), "--bundle", str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
