"""The load test's judgements without a server, and one short run of it against a real one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines.demo import BUNDLE as DEMO
from loadtest import __main__ as command
from loadtest.client import read_metrics
from loadtest.compare import compare, too_short
from loadtest.drive import callers
from loadtest.html import page
from loadtest.mix import Entry, Mix, MixError, abridged, plain_entries, read_entries
from loadtest.provenance import begin_run
from loadtest.response_formats import FACES, Answer, Part, Reply, server_sent
from loadtest.results import (
    OUTCOMES,
    STAGES,
    Load,
    Measured,
    Outcome,
    Point,
    Sent,
    Summary,
    outcome_of,
    percentiles,
    rows_between,
    sum_up,
)
from loadtest.svg import Axis, steps
from loadtest.sweep import breaks, holds, knee, next_rate
from tests.support.serving import Serving

NOBODY = "http://127.0.0.1:9"  # the port of discard, which refuses


def sent(due: float, latency: float, *, late: float = 0.0, outcome: Outcome = "completed", **more: Any) -> Sent:
    told = {"load": 0, "number": 0, "entry": 0, "counted": True, "alone": 0.1, "accepted": 0.4, "fields": {}}
    return Sent(due=due, sent=due + late, ended=due + latency, outcome=outcome, **{**told, **more})


def point(rate: float, *, goodput: float, slowdown: float | None = 2.0) -> Point:
    tally: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
    return Point(
        number=0,
        load=Load(rate=rate, warm_up=0, seconds=10),
        requests=int(rate * 10),
        offered=rate,
        throughput=goodput,
        goodput=goodput,
        outcomes=tally,
        latency=None,
        slowdown=slowdown,
        late=None,
        kept_up=True,
        step_rows={},
        samples=(),
    )


# --- what is sent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"prompt": "a"}\n{"prompt"', "Line 2 .* no JSON"),
        ('["a"]', "Line 1 .* no JSON object"),
        ('{"prompt": "a", "weight": 0}', "weight is 0"),
        ('{"prompt": "a", "weight": "2"}', "weight is '2'"),
        ('{"prompt": "a", "weight": NaN}', "weight is nan"),
        ('\n{"num_inference_steps": 3}', "Line 2 .* no prompt"),
    ],
)
def test_a_mix_that_cannot_be_read_is_told_by_its_line(text: str, message: str) -> None:
    with pytest.raises(MixError, match=message):
        read_entries(text)


def test_a_mix_is_drawn_by_its_weights_and_the_same_again() -> None:
    entries = read_entries('{"prompt": "a", "weight": 3}\n\n{"prompt": "b", "scheduler": "ddim"}')
    assert [(entry.name, entry.weight) for entry in entries] == [("line 1", 3), ("line 3", 1)]
    mix, again = Mix(entries, 1), Mix(entries, 1)
    picks = [mix.pick(number) for number in range(2000)]
    assert picks == [again.pick(number) for number in range(2000)]
    assert 0.70 < picks.count(0) / len(picks) < 0.80
    assert mix.mean([1.0, 5.0]) == 2.0


def test_seeds_differ_unless_they_are_given() -> None:
    mix = Mix((*plain_entries(["a"], steps=3), Entry(name="b", weight=1, fields={"prompt": "b", "seed": 5})), 7)
    first, second = (mix.fields(0, number) for number in (0, 1))
    assert first["seed"] != second["seed"]
    assert first == {"prompt": "a", "num_inference_steps": 3, "seed": first["seed"]}
    assert mix.fields(1, 0)["seed"] == 5


def test_pictures_are_not_kept() -> None:
    assert abridged({"prompt": "a", "image": "x" * 1000}) == {"prompt": "a", "image": "(1000 characters)"}


def test_callers_come_by_chance_and_the_same_again() -> None:
    load, mix = Load(rate=20, warm_up=10, seconds=90), Mix(plain_entries(["a", "b"], steps=None), 3)
    coming = list(callers(load, mix))
    assert coming == list(callers(load, mix))
    assert len(coming) == pytest.approx(2000, rel=0.1)
    assert all(caller.due < load.end for caller in coming)
    assert {caller.entry for caller in coming} == {0, 1}


# --- what comes of it


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "completed"), (429, "refused"), (503, "not ready"), (422, "failed"), (500, "failed"), (302, "failed")],
)
def test_every_status_is_one_outcome(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) == outcome


WHOLE = {"images": [{}], "timings": dict.fromkeys((*STAGES, "total"), 0.5)}
TIMING = ", ".join(f"{stage};dur=500.0" for stage in (*STAGES, "total"))
PNG = b"\x89PNG\r\n\x1a\n and so on"


def event(name: str, document: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()


def answer_of(face: str, status: int, *contents: bytes, **headers: str) -> Answer:
    """To a request whose answer came in pieces, a second apart."""
    parts = [Part(float(second), content) for second, content in enumerate(contents, 1)]
    told = httpx.Headers({name.replace("_", "-"): value for name, value in headers.items()})
    return FACES[face].answer(Reply(status, told, parts))


@pytest.mark.parametrize(
    ("face", "content"),
    [("json", json.dumps(WHOLE).encode()), ("png", PNG), ("events", event("completed", WHOLE))],
    ids=["json", "png", "events"],
)
def test_every_face_tells_the_stages(face: str, content: bytes) -> None:
    answer = answer_of(face, 200, content[:9], content[9:], server_timing=TIMING)
    assert (answer.outcome, answer.stages) == ("completed", dict.fromkeys(STAGES, 0.5))
    assert answer.pause == 0


@pytest.mark.parametrize(
    ("face", "content"),
    [
        ("json", b""),
        ("json", b"[]"),
        ("json", json.dumps({**WHOLE, "images": []}).encode()),
        ("json", b'{"images": [1], "timings": {}}'),
        ("png", b"<html>"),
        ("events", b""),
        ("events", event("step", {"step": 1, "steps": 2})),
        ("events", event("completed", {**WHOLE, "images": []})),
        ("events", event("completed", WHOLE)[:-1]),  # cut off before it was whole
    ],
)
def test_an_answer_without_pictures_has_failed(face: str, content: bytes) -> None:
    assert answer_of(face, 200, content, server_timing=TIMING).outcome == "failed"


def test_a_file_without_timings_has_failed() -> None:
    assert answer_of("png", 200, PNG).outcome == "failed"
    assert answer_of("png", 200, PNG, server_timing="queue;dur=1").outcome == "failed"


def test_events_tell_when_the_first_step_was_done() -> None:
    step = event("step", {"step": 1, "steps": 2})
    answer = answer_of(
        "events", 200, event("queued", {}), step[:5], step[5:] + b": ping\n\n", event("completed", WHOLE)
    )
    assert answer.first_step == 3.0
    assert answer.outcome == "completed"


@pytest.mark.parametrize(
    ("status", "outcome", "pause"), [(429, "refused", 1.0), (503, "not ready", 1.0), (500, "failed", 1.0)]
)
def test_an_error_among_events_is_judged_by_its_status(status: int, outcome: Outcome, pause: float) -> None:
    problem = {"title": "Gone", "status": status, "detail": "The device is lost."}
    answer = answer_of("events", 200, event("queued", {}), event("error", problem))
    assert (answer.outcome, answer.status, answer.detail) == (outcome, status, "The device is lost.")
    assert answer.pause == pause


def test_lines_of_events_may_end_as_they_like() -> None:
    parts = [Part(1.0, b": hello\r\n\r"), Part(2.0, b"\nevent: a\r\ndata: 1\r\ndata:2\r\n\r\n")]
    assert list(server_sent(parts)) == [(2.0, "a", b"1\n2")]


@pytest.mark.parametrize(
    ("told", "seconds"), [("3", 3.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), (None, None)], ids=["s", "date", "none"]
)
def test_a_refusal_keeps_what_the_server_said(told: str | None, seconds: float | None) -> None:
    answer = answer_of("events", 429, b'{"detail": "64 wait."}', **({"retry_after": told} if told else {}))
    assert answer.pause == (seconds or 1.0)
    assert (answer.outcome, answer.retry_after, answer.detail) == ("refused", seconds, "64 wait.")


def test_latency_counts_from_when_a_request_was_due() -> None:
    one = sent(10.0, 2.0, late=1.5, stages={"queue": 0.1, "denoise": 0.3})
    assert one.latency == 2.0
    assert one.late == 1.5
    assert one.rest == pytest.approx(1.6)


def test_percentiles_lie_between_the_values_beside_them() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99, found.most) == (50, 90, 95, 99, 100)
    assert percentiles([]) is None


def test_a_load_is_summed_up_without_its_warm_up() -> None:
    load = Load(rate=1, warm_up=2, seconds=10)
    requests = [
        sent(1.0, 0.1, counted=False),  # ended before counting began
        sent(1.5, 1.0, counted=False),  # ended after: the server's work, nobody's latency
        sent(3.0, 0.2),
        sent(4.0, 0.8),  # later than accepted
        sent(5.0, 0.01, outcome="refused"),
        sent(11.9, 0.3),  # in time, but ended after the load
    ]
    found = sum_up(load, 0, requests, step_rows={2: 5})
    assert (found.requests, found.offered, found.throughput, found.goodput) == (4, 0.4, 0.3, 0.2)
    assert found.outcomes == {"completed": 3, "refused": 1, "not ready": 0, "failed": 0, "client timeout": 0}
    assert found.latency is not None
    assert found.latency.p50 == pytest.approx(0.3)
    assert found.slowdown == pytest.approx(8.0, rel=0.05)
    assert found.kept_up
    assert found.other_failures == 0


def test_a_client_that_is_late_is_told() -> None:
    load = Load(rate=1, warm_up=0, seconds=10)
    assert not sum_up(load, 0, [sent(1.0, 0.5, late=0.3)], step_rows={}).kept_up
    assert sum_up(load, 0, [sent(1.0, 50.0, late=0.3)], step_rows={}).kept_up  # who would notice


def test_rows_are_what_a_cumulative_histogram_grew_by() -> None:
    text = "\n".join(
        f'latentd_step_rows_bucket{{le="{le}"}} {count}' for le, count in (("1.0", 1), ("2.0", 5), ("+Inf", 5))
    )
    scrape = read_metrics(f"# TYPE latentd_step_rows histogram\n{text}\n# TYPE process_x gauge\nprocess_x 3\n")
    assert scrape.gauges["process_x"] == 3
    assert rows_between({1.0: 1, 2.0: 2, float("inf"): 2}, scrape.step_rows) == {1: 0, 2: 3}


# --- where it breaks


def swept(held: float, *, first: float, factor: float = 1.5) -> list[float]:
    """The rates that a sweep tries on a server that holds up to `held` per second."""
    points: list[Point] = []
    while (rate := next_rate(points, first=first, factor=factor)) is not None:
        points.append(point(rate, goodput=rate if rate <= held else held * 0.5))
    return [one.load.rate or 0.0 for one in points]


def test_a_sweep_goes_on_to_twice_the_knee() -> None:
    rates = swept(5.0, first=1.0)
    assert rates == pytest.approx([1.0, 1.5, 2.25, 3.375, 5.0625, 6.75])
    assert max(rates) == 2 * knee([point(rate, goodput=rate if rate <= 5 else 1) for rate in rates])  # type: ignore[operator]


def test_a_sweep_that_begins_too_high_goes_down_first() -> None:
    assert swept(3.0, first=10.0) == [10.0, 5.0, 2.5]
    assert len(swept(0.0, first=100.0)) == 7  # and gives up on a server that holds nothing
    assert len(swept(1e9, first=1.0)) == 20


def test_what_holds() -> None:
    assert holds(point(10, goodput=9.1))
    assert not holds(point(10, goodput=8.9))
    assert not holds(point(10, goodput=10, slowdown=11.0))
    assert not holds(point(10, goodput=0, slowdown=None))
    assert not holds(point(0.01, goodput=0, slowdown=None))  # nobody came
    assert knee([point(4, goodput=1), point(1, goodput=1), point(2, goodput=2), point(8, goodput=8)]) == 2
    assert knee([point(1, goodput=0)]) is None
    assert breaks([point(1, goodput=1), point(2, goodput=1)])


# --- beside an earlier run


def run_of(seed: int, *, factor: float = 1.0, rate: float = 10.0, seconds: float = 60.0) -> list[Measured]:
    """A load whose latencies are by chance, and all `factor` times as long."""
    dice, load = np.random.default_rng(seed), Load(rate=rate, warm_up=0, seconds=seconds)
    due = np.sort(dice.uniform(0, seconds, int(rate * seconds)))
    latency = 0.2 * dice.lognormal(0, 0.3, len(due)) * factor
    requests = [sent(float(at), float(took)) for at, took in zip(due, latency, strict=True)]
    return [Measured(sum_up(load, 0, requests, step_rows={}), tuple(requests))]


def regressed(before: Sequence[Measured], after: Sequence[Measured]) -> set[str]:
    return {one.figure for one in compare(before, after) if one.regressed}


def test_equal_runs_pass_and_a_planted_regression_fails() -> None:
    before = run_of(0)
    assert regressed(before, before) == set()
    assert regressed(before, run_of(1)) == set()
    assert {"p50", "p95"} <= regressed(before, run_of(1, factor=1.3))
    assert regressed(run_of(1, factor=1.3), before) == set()  # faster is no regression


def test_less_throughput_is_a_regression() -> None:
    before = run_of(0)
    kept = [one for index, one in enumerate(run_of(1)[0].requests) if index % 10 < 7]
    after = [Measured(before[0].point, tuple(kept))]
    assert {"throughput", "goodput"} <= regressed(before, after)


def test_a_server_that_answers_nothing_any_more_is_a_regression() -> None:
    before = run_of(0)
    assert regressed(before, [Measured(before[0].point, ())]) == {"throughput", "goodput"}


def test_other_loads_are_not_compared() -> None:
    assert compare(run_of(0), run_of(0, rate=11.0)) == []


def test_few_requests_say_nothing_of_a_p99() -> None:
    short = run_of(0, seconds=10.0)
    assert {one.figure for one in compare(short, short)} == {"throughput", "goodput", "p50", "p95"}


def test_waits_as_long_as_the_load_say_nothing() -> None:
    slow = run_of(0, factor=30.0)
    assert too_short(run_of(0)[0], slow[0])
    assert {one.figure for one in compare(slow, slow)} == {"throughput"}
    assert not too_short(run_of(0)[0], run_of(1)[0])


# --- pictures


def test_axes_have_round_ticks() -> None:
    assert Axis("", 0, 10).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis("", 0.09, 3, log=True).ticks() == pytest.approx([0.1, 0.2, 0.5, 1, 2])
    assert Axis("", 0.26, 0.39, log=True).ticks() == pytest.approx([0.3, 0.35])
    assert Axis("", 1, 100, log=True).share(10) == pytest.approx(0.5)


def test_a_distribution_ends_at_one() -> None:
    assert steps([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]
    assert steps([]) == []
    assert steps([float(value) for value in range(10_000)])[-1] == (9999.0, 1.0)


# --- errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say how much load"),
        (["--rate", "0"], "'0' is no number above 0"),
        (["--rate", "nan"], "'nan' is no number above 0"),
        (["--users", "1.5"], "no whole number"),
        (["--rate", "1", "--mix", "x", "--steps", "3"], "--mix says prompts and steps itself"),
        (["--sweep", "--baseline", "x"], "--baseline compares equal loads"),
    ],
)
def test_a_command_that_says_too_little_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--out", "nowhere", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", NOBODY], "No server answers at http://127.0.0.1:9"),
        (["--url", "nonsense"], "No server answers at nonsense"),
        (["--url", NOBODY, "--baseline", "nowhere"], "nowhere holds no run to compare with"),
    ],
)
def test_what_cannot_be_measured_is_told(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--rate", "1", "--out", str(tmp_path), *words]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


# --- for real


def test_a_run_against_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loads that it holds, one that it refuses much of, and users; then once more beside that, and a bad mix."""
    mix, out = tmp_path / "mix.jsonl", tmp_path / "run"
    entry = {"prompt": "a red <heart> on a yellow background", "num_inference_steps": 2}
    mix.write_text("\n".join(json.dumps({**entry, "scheduler": name}) for name in ("euler", "dpmpp_2m")))
    with Serving(DEMO, "--max-waiting", "1") as serving:
        words = ["--url", serving.url, "--mix", str(mix), "--warm-up", "0.5", "--timeout", "60"]
        measured = [*words, "--rate", "200", "--rate", "2", "--users", "2", "--duration", "1.5"]
        assert command.main([*measured, "--out", str(out)]) == 0
        asked = sum(value for name, value in serving.metrics().items() if name.startswith("latentd_requests_total"))
        refused = serving.metrics()['latentd_requests_rejected_total{reason="QueueFull"}']
        again = [*words, "--rate", "2", "--duration", "1.5", "--baseline", str(out), "--out", str(tmp_path / "again")]
        assert command.main(again) in {0, 1}  # so few requests may say anything
        assert command.main([*words, "--rate", "3", "--baseline", str(out), "--out", str(tmp_path / "other")]) == 2
        mix.write_text(json.dumps({**entry, "scheduler": "magic"}))
        assert command.main([*measured, "--out", str(out / "bad")]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "has none of these loads, but 2/s, 200/s, 2 users" in shown
    assert re.search(r"error: line 1: failed \(422\): .*magic", shown)

    requests = [Sent.model_validate_json(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    ended = Counter((one.load, one.number) for one in requests)
    assert set(ended.values()) == {1}
    for number, rate in enumerate((200.0, 2.0)):
        due = [
            caller.due for caller in callers(Load(rate=rate, warm_up=0.5, seconds=1.5), Mix(read_entries_of(out), 0))
        ]
        assert sorted(one.due for one in requests if one.load == number) == due  # everyone who was due, and nobody else
    told = Counter(one.outcome for one in requests)
    assert told["refused"] == refused > 0
    assert told["completed"] + 2 * 4 == asked  # and those that were alone, before
    assert told.keys() <= {"completed", "refused"}
    assert all(one.retry_after is not None for one in requests if one.outcome == "refused")
    assert all(one.stages and one.stages.keys() == set(STAGES) for one in requests if one.outcome == "completed")
    assert all(one.due <= one.sent <= one.ended for one in requests)

    summary = Summary.model_validate_json((out / "summary.json").read_bytes())
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
    assert not re.search(r"<(script|link|img)|url\(|(src|href)=", report)
    beside = Summary.model_validate_json((tmp_path / "again" / "summary.json").read_bytes())
    assert {one.load for one in beside.compared} <= {"2/s"}
    assert f"Beside {out}" in (tmp_path / "again" / "report.html").read_text()


def read_entries_of(out: Path) -> tuple[Entry, ...]:
    return Summary.model_validate_json((out / "summary.json").read_bytes()).entries


@pytest.mark.parametrize("face", ["png", "events"])
def test_a_run_that_asks_otherwise(face: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures come, stages are told, and a wrong mix is refused in the server's words all the same."""
    with Serving(DEMO) as serving:
        words = ["--url", serving.url, "--face", face, "--steps", "2", "--timeout", "60", "--out", str(tmp_path)]
        assert command.main([*words, "--users", "2", "--warm-up", "0", "--duration", "1.5"]) == 0
        mix = tmp_path / "mix.jsonl"
        mix.write_text(json.dumps({"prompt": "a heart", "scheduler": "magic"}))
        wrong = [
            "--url",
            serving.url,
            "--face",
            face,
            "--users",
            "1",
            "--mix",
            str(mix),
            "--out",
            str(tmp_path / "bad"),
        ]
        assert command.main(wrong) == 2
    assert re.search(r"error: line 1: failed \(422\): .*magic", " ".join(capsys.readouterr().out.split()))
    requests = [Sent.model_validate_json(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    summary = Summary.model_validate_json((tmp_path / "summary.json").read_bytes())
    assert {one.outcome for one in requests} == {"completed"}
    assert all(one.stages and one.stages["denoise"] > 0 for one in requests)
    assert summary.face == face
    assert ("first step" in (tmp_path / "report.html").read_text()) == (face == "events")
    (found,) = summary.points
    if face == "events":
        assert found.first_step
        assert found.latency
        assert found.first_step.p50 < found.latency.p50
        assert all(one.first_step and one.sent < one.first_step < one.ended for one in requests)
    else:
        assert found.first_step is None


def test_a_run_in_which_nothing_came_through_is_still_told() -> None:
    """Every figure of it may be missing."""
    load = Load(rate=1, warm_up=0, seconds=10)
    lost = sent(1.0, 3.0, outcome="client timeout")
    found = Measured(sum_up(load, 0, [lost], step_rows={}), (lost,))
    summary = Summary(
        run=begin_run(["python", "-m", "loadtest"]),
        url=NOBODY,
        server_version=None,
        models=[],
        seed=0,
        slo=1.0,
        slo_given=True,
        entries=plain_entries(["a"], steps=1),
        alone=(0.1,),
        points=(found.point,),
        knee=None,
        notes=("A note.",),
    )
    text = page(summary, [found])
    assert "None of these rates held." in text
    assert "Nothing was completed." in text
    assert command.table(summary).row_count == 1
