"""The start-up benchmark: a short run of it, and a server that does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.server import startup
from benchmarks.server.startup import Startup
from tests import ROOT


def test_a_short_run_of_it_next_to_another_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "startup.json"
    other = tmp_path / "other"
    other.symlink_to(ROOT)
    assert startup.main(["--out", str(out), "--runs", "2", "--compare", str(other), "--", "--threads", "1"]) == 0
    found = Startup.model_validate_json(out.read_bytes())
    assert [len(one.starts) for one in found.trees] == [2, 2]
    assert all(start.ready > 0 and start.cpu > 0 for one in found.trees for start in one.starts)
    assert "--threads 1" in found.run.command
    assert "time to ready" in capsys.readouterr().out


def test_a_server_that_does_not_start_ends_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(["--out", str(tmp_path / "none.json"), "--", "--bundle", str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
