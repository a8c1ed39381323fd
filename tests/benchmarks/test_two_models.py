"""What two models get of one server, and what counts as a lost request."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.callers import Answer
from benchmarks.server import two_models
from benchmarks.server.two_models import ModelFigures, TwoModelsResults, loss


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        (Answer("completed", 1.0, 200), False),
        (Answer("unavailable", 1.0, 503), False),
        (Answer("refused", 1.0, 429), False),
        (Answer("unavailable", 1.0, 200), True),  # it was accepted: the stream had begun
        (Answer("failed", 1.0, 500), True),
        (Answer("disconnected", 1.0), True),
        (Answer("invalid", 1.0, 404), True),
    ],
)
def test_what_was_accepted_and_got_no_image_is_lost(answer: Answer, lost: bool) -> None:
    assert bool(loss("demo", answer)) == lost


def test_a_model_keeps_a_share_of_its_throughput() -> None:
    figures = ModelFigures(name="demo", images=1, alone=(1.0,), shared=(2.0,), rate_alone=4.0, rate_shared=1.0)
    assert figures.kept == 0.25
    assert figures.model_copy(update={"rate_alone": 0.0}).kept == 0


@pytest.mark.faults
def test_two_demos_share_a_server_and_reloading_one_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "two-models.json"
    short = ["--seconds", "4", "--warm-up", "1", "--users", "2", "--steps", "6"]
    two_models.main(["--out", str(out), *short])  # its exit code also judges the shares, which take a quiet machine
    found = TwoModelsResults.model_validate_json(out.read_bytes())
    assert found.reloads.times > 0
    assert found.reloads.lost == ()
    assert [model.name for model in found.models] == ["first", "second"]
    assert all(model.rate_shared > 0 for model in found.models)
