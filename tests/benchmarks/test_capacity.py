"""A server's capacity, predicted and measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.server import capacity
from benchmarks.server.capacity import CapacityResults


@pytest.mark.faults  # three minutes of load
def test_prediction_and_measurement_are_of_the_same_requests(tmp_path: Path) -> None:
    out = tmp_path / "capacity.json"
    assert capacity.main(["--out", str(out), "--steps", "6", "--seconds", "10", "--warm-up", "2"]) == 0
    found = CapacityResults.model_validate_json(out.read_bytes())
    assert (found.model, found.size, found.work.steps, found.work.rows) == ("latentd-demo", "64x64", 6, 2)
    assert max(found.curve) == found.predicted.rows == 16
    assert 0.3 < 1 + found.error < 2, "which only a quiet machine says more exactly"
    assert found.loaded.requests


def test_a_server_that_is_not_there_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main(["--out", str(tmp_path / "out.json"), "--url", "http://127.0.0.1:1"]) == 2
    assert "No server answers at http://127.0.0.1:1" in capsys.readouterr().err
