"""The comparison of servers: its judgements without one, and a short run of it with two real ones."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.peers.servers import __main__ as command
from benchmarks.peers.servers.results import SLO, ScenarioResult, ServerResult, ServingResults, ServingSettings, entries
from loadtest.analysis.results import LoadLevel, RequestRecord
from loadtest.generator import request_schedule

NAMES = ["fastapi", "litserve", "onnxruntime"]
SETTINGS = ServingSettings(rates=(0.5, 2.0), seconds=1.5, warm_up=0.5, steps=2, threads=1, seed=0)


def test_requests_are_alike_or_half_of_them_use_the_defaults() -> None:
    same, mixed = entries("same", 20), entries("mixed", 20)
    assert len({frozenset({**entry.fields, "prompt": ""}.items()) for entry in same}) == 1
    assert {entry.fields["num_inference_steps"] for entry in mixed} == {10, 20, 30}
    assert mixed[0].weight == sum(entry.weight for entry in mixed[1:])
    assert all(entry.fields["num_inference_steps"] >= 1 for entry in entries("mixed", 1))


def test_the_peers_know_the_schedulers_of_the_mix() -> None:
    pipeline = pytest.importorskip("benchmarks.peers.servers.diffusers_pipeline", exc_type=ImportError)
    for entry in (*entries("same", 20), *entries("mixed", 20)):
        assert pipeline.DiffusersRequest(seed=0, **entry.fields).scheduler in pipeline.SCHEDULERS


def test_loads_without_a_yardstick_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "onnxruntime"]) == 2
    assert "its request rates follow from fastapi, which was not measured" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({}, ["--rate", "1"], "was measured with other options"),
        ({"format": 2}, [], "is not a results file of this command"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(
    changed: dict[str, Any], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ServingResults(settings=SETTINGS, scenarios={"same": entries("same", 2)}, peers={})
    (tmp_path / "serving.json").write_text(json.dumps(record.model_dump(mode="json") | changed))
    assert command.main(["--out", str(tmp_path), "--resume", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_interpreter_that_does_not_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--peers-python", str(tmp_path / "python")]) == 2
    assert "does not run: give the interpreter with --peers-python" in " ".join(capsys.readouterr().err.split())


def test_different_images_are_a_failure() -> None:
    record = ServingResults(settings=SETTINGS, scenarios={}, peers={})
    measured = {"run": 0, "loads": (ScenarioResult(scenario="same", alone=(), points=()),)}
    assert command.judge(record, Console(quiet=True)) == 2  # nothing was measured
    record.put(ServerResult(server="fastapi", **measured))
    record.put(ServerResult(server="onnxruntime", psnr=60.0, **measured))
    assert command.judge(record, Console(quiet=True)) == 0
    record.put(ServerResult(server="onnxruntime", psnr=20.0, **measured))
    assert command.judge(record, Console(quiet=True)) == 1


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
def test_a_run_with_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The yardstick and ours; LitServe too where it is installed."""
    words = ["--out", str(tmp_path), "--rate", "0.5", "2", "--duration", "1.5", "--warm-up", "0.5"]
    words += ["--steps", "2", "--threads", "1"]
    assert command.main([*words, "--only", *NAMES]) == 0
    shown = capsys.readouterr().out

    record = ServingResults.model_validate_json((tmp_path / "serving.json").read_bytes())
    assert record.settings == SETTINGS
    assert "benchmarks.peers.servers" in record.runs[0].command
    assert {"torch", "diffusers", "fastapi"} <= record.peers.keys()
    measured = [name for name in NAMES if name != "litserve" or find_spec("litserve")]
    for name in measured:
        check_server(tmp_path, record, name)
    yardstick, ours = record.find("fastapi"), record.find("onnxruntime")
    assert yardstick is not None
    assert ours is not None
    assert ours.psnr is not None
    assert ours.psnr > 35
    for scenario in ("same", "mixed"):
        one, other = yardstick.under(scenario), ours.under(scenario)
        assert one is not None
        assert other is not None
        assert [point.load for point in one.points] == [point.load for point in other.points]  # the same callers

    page = (tmp_path / "serving.md").read_text()
    assert page in shown
    assert page.count("| latentd, ONNX Runtime |") == 1 + 2 * 2  # what it is, and each rate of each scenario
    assert "| latentd, OpenVINO |" not in page
    if not find_spec("litserve"):
        assert f"not installed: {sys.executable} -m pip install litserve" in page
    ET.parse(tmp_path / "serving.svg")  # noqa: S314 - our own


def check_server(out: Path, record: ServingResults, name: str) -> None:
    """Each request that was due has one outcome, and the results count them."""
    result = record.find(name)
    assert result is not None
    assert result.note == ""
    assert result.ready_after is not None
    assert result.ready_after > 0
    assert result.memory is not None
    assert result.memory > 50e6
    requests = [
        RequestRecord.model_validate_json(line) for line in (out / f"requests-{name}.jsonl").read_text().splitlines()
    ]
    assert set(Counter((one.load, one.number) for one in requests).values()) == {1}
    for under in result.loads:
        idle = record.idle(under.scenario)
        assert idle is not None
        for share, point in zip(record.settings.rates, under.points, strict=True):
            sent = [one for one in requests if one.load == point.number]
            load = LoadLevel(rate=share / idle, warm_up=0.5, seconds=1.5)
            due = [caller.due for caller in request_schedule(load, record.mix(under.scenario))]
            assert sorted(one.due for one in sent) == pytest.approx(due)
            assert sum(point.outcomes.values()) == point.requests == sum(one.counted for one in sent)
            assert {one.outcome for one in sent} <= {"completed"}, [one.detail for one in sent]
            assert all(one.latency_target == pytest.approx(SLO * idle) for one in sent)
