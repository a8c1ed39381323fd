"""The arithmetic of the gate; and what it sees of a server that is a fifth slower, where timings mean something."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.server import gate
from benchmarks.server.gate import GateServer
from engines.demo import BUNDLE as DEMO
from loadtest import __main__ as command
from loadtest.analysis.results import LoadTestSummary
from loadtest.generator import request_schedule
from loadtest.mix import Mix, Wanted, plain_entries
from tests import ROOT
from tests.support.serving import Serving

HERE = GateServer(ROOT)
SLOWED = GateServer(ROOT, "tests.support.slowed_server", ("1.2",))


def seconds(seed: int, times: float = 1.0, count: int = 80) -> gate.Floats:
    noise: gate.Floats = 0.2 * np.random.default_rng(seed).lognormal(0, 0.1, count) * times
    return noise


def test_equal_servers_pass_and_a_slower_one_does_not() -> None:
    ratio, low, high = gate.compare(seconds(0), seconds(1))
    assert low < 1 < high < 1.05 < high / low * 1.05
    assert ratio == pytest.approx(1, abs=0.05)
    ratio, low, high = gate.compare(seconds(0), seconds(1, times=1.2))
    assert 1.05 < low < ratio < high
    assert ratio == pytest.approx(1.2, abs=0.05)


def test_a_neighbour_that_stops_everything_once_in_a_while_is_no_regression() -> None:
    after = seconds(1)
    after[::20] *= 30
    assert gate.compare(seconds(0), after)[1] < 1.05


def test_what_all_rounds_agree_on_is_exact() -> None:
    before = seconds(0)
    assert gate.compare(before, 1.1 * before) == pytest.approx((1.1, 1.1, 1.1))


@pytest.mark.parametrize("count", [8, 10, 12])
def test_the_interval_misses_the_truth_as_seldom_as_it_says(count: int) -> None:
    """All combinations of signs of values around 0."""
    values = np.arange(1.0, count + 1) + 0.01 * np.arange(count) ** 2
    beyond, signs = gate.ends(count), np.array(list(itertools.product((-1, 1), repeat=count)))
    means = [np.sort(gate.walsh(values * one)) for one in signs]
    missed = [(one[beyond] > 0) or (one[-1 - beyond] < 0) for one in means]
    assert np.mean(missed) <= 0.01
    narrower = [(one[beyond + 1] > 0) or (one[-2 - beyond] < 0) for one in means]
    assert np.mean(narrower) > 0.01


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="7 pairs are too few"):
        gate.ends(7)


def test_every_crowd_has_callers() -> None:
    for seed, alone in itertools.product(range(gate.CROWDS), (0.01, 3.0)):
        assert list(request_schedule(gate.crowd_load(alone), Mix(plain_entries(Wanted(["a"], 1)), seed)))


def test_both_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = asyncio.run(gate.measure(HERE, HERE, pairs=8, crowds=8))
    assert [one.measurement for one in found] == ["idle latency", "latency under load"]
    assert all(0 < one.low <= one.ratio <= one.high for one in found)
    assert all(one.before > 0 for one in found)
    assert capsys.readouterr().out == ""


def test_a_tree_that_does_not_serve_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engines").symlink_to(ROOT / "engines")
    shutil.copytree(ROOT / "server", tmp_path / "server")
    (tmp_path / "server" / "app.py").write_text("raise RuntimeError('written in haste')\n")
    assert gate.main([str(tmp_path), str(ROOT)]) == 2
    said = capsys.readouterr().err
    assert f"in {tmp_path} ended with exit code" in said
    assert "written in haste" in said


# --- for real, and with timings


@pytest.mark.perf
def test_a_fifth_is_seen_against_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--users", "1", "--steps", "4", "--warm-up", "2", "--duration", "20"]

    def measure(serving: Serving, out: str, *more: str) -> int:
        return command.main(["--url", serving.url, *words, "--out", str(tmp_path / out), *more])

    baseline = ("--baseline", str(tmp_path / "before"))
    with Serving(DEMO) as serving:
        assert measure(serving, "before") == 0
        assert measure(serving, "again", *baseline) == 0
    capsys.readouterr()
    with Serving(DEMO, "1.2", module="tests.support.slowed_server") as serving:
        assert measure(serving, "slowed", *baseline) == 1
    shown = capsys.readouterr().out
    for figure in ("throughput", "p50"):
        assert re.search(rf"{figure} .* regressed", shown), shown
    summary = LoadTestSummary.model_validate_json((tmp_path / "slowed" / "summary.json").read_bytes())
    assert {"throughput", "p50"} <= {one.figure for one in summary.compared if one.regressed}


@pytest.mark.perf
def test_a_fifth_is_seen_in_alternation() -> None:
    assert [one.regressed for one in asyncio.run(gate.measure(HERE, SLOWED))] == [True, True]


@pytest.mark.perf
def test_nothing_is_seen_where_nothing_changed() -> None:
    assert [one.regressed for one in asyncio.run(gate.measure(HERE, HERE))] == [False, False]
    assert [one.regressed for one in asyncio.run(gate.measure(SLOWED, HERE))] == [False, False]
