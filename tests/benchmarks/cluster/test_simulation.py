"""The simulation's command: its runs, the load at which p99 breaks, the autoscaler, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cluster import simulation
from benchmarks.cluster.autoscaler import Scaling, wanted_servers
from benchmarks.cluster.curve import ASSUMED, StepCurve
from benchmarks.cluster.figure import figure_svg
from benchmarks.cluster.results import SeedFigures, SimulationResults, break_load
from benchmarks.cluster.studies import Study, Task
from loadtest.provenance import begin_run

CURVE = StepCurve.read(ASSUMED)
ROWS = Scaling(signal="rows", target=0.6, start=60)


class Few(Study):
    """The first and the last runs of the smallest cluster."""

    def tasks(self) -> Iterator[Task]:
        yield from [*super().tasks()][:6]
        yield from [*super().tasks()][-9:]


def one_seed(p99: float | None) -> list[SeedFigures]:
    return [
        SeedFigures(seed=0, requests=1, refused=0, lost=0, median=p99, p99=p99, p99_seconds=p99, good=1.0, open=1.0)
    ]


def test_results_are_written_read_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "Study", lambda curve, seeds: Few(curve, seeds, sizes=(8,), shorter=0.02))
    out, figure = tmp_path / "cluster.json", tmp_path / "scaling.svg"
    assert simulation.main(["--out", str(out), "--figure", str(figure), "--seeds", "2", "--jobs", "1"]) == 0
    found = SimulationResults.model_validate_json(out.read_bytes())
    assert found.curve == CURVE
    assert {point.size for point in found.loads} == {8}
    assert {len(point.runs) for point in found.loads} == {len(point.runs) for point in found.scaling} == {2}
    assert "8 GPUs" in figure.read_text()


def test_a_curve_that_is_missing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "cluster.json"), "--curve", str(tmp_path / "none.json")]
    assert simulation.main(words) == 2
    assert "none.json" in capsys.readouterr().err.replace("\n", "")


def test_p99_breaks_where_it_crosses_the_limit() -> None:
    line = [(0.5, one_seed(3.0)), (0.7, one_seed(3.5)), (0.8, one_seed(4.5)), (0.9, one_seed(None))]
    found = break_load(line)
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert break_load(line[:2]) is None
    without = break_load([(0.5, one_seed(3.0)), (0.9, one_seed(None))])
    assert without is not None
    assert without.mean == 0.9


@pytest.mark.parametrize(("total", "servers"), [(6.0, 10), (6.5, 10), (9.0, 15), (3.0, 5), (0.0, 2), (99.0, 24)])
def test_an_autoscaler_wants_servers_in_proportion(total: float, servers: int) -> None:
    """Within a tenth of the target nothing changes, as in Kubernetes."""
    assert wanted_servers(total, 10, ROWS) == servers


def test_an_autoscaler_follows_a_load_by_rows_and_not_by_what_waits() -> None:
    study = Study(CURVE, (1,), shorter=0.5)
    by_rows, by_waiting = (
        study.scale(Scaling(signal=signal, target=target, start=30))
        for signal, target in (("rows", 0.6), ("waiting", 1.0))
    )
    assert by_rows.runs[0].good > 0.95 > by_waiting.runs[0].good
    assert by_rows.runs[0].lost == by_waiting.runs[0].lost == 0


def test_the_figure_has_every_cluster_even_without_runs() -> None:
    empty = SimulationResults(
        run=begin_run(["python"]), curve=CURVE, mix=(), capacity=1.0, loads=(), losses=(), scaling=()
    )
    assert "<svg" in figure_svg(empty)
