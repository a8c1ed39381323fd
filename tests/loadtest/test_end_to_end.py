"""The command against a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import httpx
import pytest

from engines.demo import BUNDLE as DEMO
from loadtest import __main__ as command
from loadtest.analysis.results import STAGES, LoadLevel, LoadTestSummary, RequestRecord
from loadtest.generator import request_schedule
from loadtest.mix import Mix, MixEntry
from tests.support.serving import Serving


def test_run_against_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sustained loads, one that overloads it, and users; then a comparison with that run, and an invalid mix."""
    mix, out = tmp_path / "mix.jsonl", tmp_path / "run"
    entry = {"prompt": "a red <heart> on a yellow background", "num_inference_steps": 2}
    mix.write_text("\n".join(json.dumps({**entry, "scheduler": name}) for name in ("euler", "dpmpp_2m")))
    with Serving(DEMO, "--max-waiting", "1") as serving:
        words = ["--url", serving.url, "--mix", str(mix), "--warm-up", "0.5", "--timeout", "60"]
        measured = [*words, "--rate", "200", "--rate", "2", "--users", "2", "--duration", "1.5"]
        assert command.main([*measured, "--out", str(out)]) == 0
        asked = serving.total("latentd_requests_total")
        refused = serving.metrics()['latentd_requests_rejected_total{reason="QueueFull"}']
        again = [*words, "--rate", "2", "--duration", "1.5", "--baseline", str(out), "--out", str(tmp_path / "again")]
        assert command.main(again) in {0, 1}  # so few requests may differ by chance
        assert command.main([*words, "--rate", "3", "--baseline", str(out), "--out", str(tmp_path / "other")]) == 2
        mix.write_text(json.dumps({**entry, "scheduler": "magic"}))
        assert command.main([*measured, "--out", str(out / "bad")]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "has none of these loads, but 2/s, 200/s, 2 users" in shown
    assert re.search(r"error: line 1: failed \((422|400)\): .*magic", shown)

    requests = [RequestRecord.model_validate_json(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    ended = Counter((one.load, one.number) for one in requests)
    assert set(ended.values()) == {1}
    for number, rate in enumerate((200.0, 2.0)):
        due = [
            request.due
            for request in request_schedule(
                LoadLevel(rate=rate, warm_up=0.5, seconds=1.5), Mix(read_entries_of(out), 0)
            )
        ]
        assert sorted(one.due for one in requests if one.load == number) == due  # exactly the schedule
    outcomes = Counter(one.outcome for one in requests)
    assert outcomes["refused"] == refused > 0
    assert outcomes["completed"] + 2 * 4 == asked  # and those that measured idle latencies before
    assert outcomes.keys() <= {"completed", "refused"}
    assert all(one.retry_after is not None for one in requests if one.outcome == "refused")
    assert all(one.stages and one.stages.keys() == set(STAGES) for one in requests if one.outcome == "completed")
    assert all(one.due <= one.sent <= one.ended for one in requests)

    summary = LoadTestSummary.model_validate_json((out / "summary.json").read_bytes())
    assert "loadtest --url" in summary.run.command
    assert summary.run.environment.packages["httpx"] == httpx.__version__
    assert summary.models[0]["name"] == "latentd-demo"
    assert [found.load.label for found in summary.points] == ["2/s", "200/s", "2 users"]
    assert [found.number for found in summary.points] == [1, 0, 2]
    for found in summary.points:
        counted = [one for one in requests if one.load == found.number and one.counted]
        assert sum(found.outcomes.values()) == found.requests == len(counted)
        assert found.samples
        assert sum(found.step_rows.values()) > 0

    report = (out / "report.html").read_text()
    assert report.count("<svg") >= 3 + 4 * 3
    assert "a red &lt;heart&gt;" in report
    assert not re.search(r"<(script|link|img)|url\((?!#)|(src|href)=(?!\"#)", report)  # self-contained
    compared = LoadTestSummary.model_validate_json((tmp_path / "again" / "summary.json").read_bytes())
    assert {one.load for one in compared.compared} <= {"2/s"}
    assert f"Compared with {out}" in (tmp_path / "again" / "report.html").read_text()


def read_entries_of(out: Path) -> tuple[MixEntry, ...]:
    return LoadTestSummary.model_validate_json((out / "summary.json").read_bytes()).entries


@pytest.mark.parametrize("response_format", ["png", "events", "openai"])
def test_other_response_formats(
    demo: Serving, response_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images arrive, stages are recorded, and an invalid mix is reported in the server's words."""
    words = ["--url", demo.url, "--format", response_format]
    measured = [*words, "--steps", "2", "--timeout", "60", "--users", "2", "--warm-up", "0", "--duration", "1.5"]
    assert command.main([*measured, "--out", str(tmp_path)]) == 0
    mix = tmp_path / "mix.jsonl"
    mix.write_text(json.dumps({"prompt": "a heart", "scheduler": "magic"}))
    assert command.main([*words, "--users", "1", "--mix", str(mix), "--out", str(tmp_path / "bad")]) == 2
    assert re.search(r"error: line 1: failed \((422|400)\): .*magic", " ".join(capsys.readouterr().out.split()))
    requests = [
        RequestRecord.model_validate_json(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()
    ]
    summary = LoadTestSummary.model_validate_json((tmp_path / "summary.json").read_bytes())
    assert {one.outcome for one in requests} == {"completed"}
    assert all(one.stages and one.stages["denoise"] > 0 for one in requests)
    assert summary.response_format == response_format
    assert ("first step" in (tmp_path / "report.html").read_text()) == (response_format == "events")
    (found,) = summary.points
    if response_format == "events":
        assert found.first_step
        assert found.latency
        assert found.first_step.p50 < found.latency.p50
        assert all(one.first_step and one.sent < one.first_step < one.ended for one in requests)
    else:
        assert found.first_step is None


class _Killer(command.RequestLog):
    """Ends the server once some requests have ended."""

    process: subprocess.Popen[str]

    def on_request(self, request: RequestRecord) -> None:
        super().on_request(request)
        if request.load == 1 and request.counted:
            self.process.kill()


def test_a_server_that_dies_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no overload: nothing is said to have been sustained, and no other rate is tried."""
    monkeypatch.setattr(command, "RequestLog", _Killer)
    loads = ["--rate", "2", "--rate", "4", "--rate", "6", "--warm-up", "0", "--duration", "4", "--slo", "20"]
    with Serving(DEMO) as serving:
        monkeypatch.setattr(_Killer, "process", serving.process, raising=False)
        assert command.main(["--url", serving.url, *loads, "--steps", "2", "--out", str(tmp_path)]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"The server died under the load 4/s, [\d.]+ m?s after it began", shown)
    assert "sustained" not in shown
    summary = LoadTestSummary.model_validate_json((tmp_path / "summary.json").read_bytes())
    assert [point.load.label for point in summary.points] == ["2/s", "4/s"]
    assert summary.knee is None
    assert summary.points[0].lost is None
    assert "The server died under the load 4/s" in (tmp_path / "report.html").read_text()
