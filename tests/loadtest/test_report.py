"""The report of a run."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from loadtest.analysis.results import ComparedMetric, LoadLevel, LoadTestSummary, MeasuredLoad, MetricsSample, summarize
from loadtest.mix import MixEntry, Wanted, plain_entries
from loadtest.provenance import begin_run
from loadtest.report.console import metrics_tables
from loadtest.report.page import render_report
from tests.loadtest.records import UNREACHABLE, request_record

HOSTILE = "<script>alert('boo')</script> & <b>"
ESCAPED = "&lt;script&gt;alert(&#39;boo&#39;)&lt;/script&gt; &amp; &lt;b&gt;"


def summary_of(*loads: MeasuredLoad) -> LoadTestSummary:
    return LoadTestSummary(
        run=begin_run(["python", "-m", "loadtest"]),
        url=UNREACHABLE,
        server_version=None,
        models=[],
        seed=0,
        slo=1.0,
        slo_given=True,
        entries=plain_entries(Wanted(["a"], 1)),
        idle_latencies=(0.1,),
        points=tuple(one.point for one in loads),
        knee=None,
        notes=("A note.",),
    )


def measured(*, samples: bool = False) -> MeasuredLoad:
    """Return ten completed requests, or a lost one."""
    load = LoadLevel(rate=1, warm_up=1, seconds=9)
    if not samples:
        lost = request_record(1.0, 3.0, outcome="client timeout")
        return MeasuredLoad(summarize(load, 0, [lost], step_rows={}), (lost,))
    taken = [MetricsSample(at=at, waiting=1, running=2, cpu=at / 2, memory=2**28 * at) for at in (0.0, 5.0, 10.0)]
    requests = [request_record(float(due), 0.2 + due / 100, stages={"denoise": 0.1}) for due in range(1, 10)]
    return MeasuredLoad(summarize(load, 0, requests, samples=taken, step_rows={2: 5}), tuple(requests))


def test_run_without_completed_requests_has_a_report() -> None:
    """Every metric of it may be missing."""
    lost = measured()
    summary = summary_of(lost)
    text = render_report(summary, [lost])
    assert "The server sustained none of these rates." in text
    assert "No request completed." in text
    assert "No step was measured." in text
    assert "does not export it" in text
    assert [table.row_count for table in metrics_tables(summary, Console(width=160))] == [1]


def test_report_has_every_chart_and_opens_the_knee() -> None:
    load = measured(samples=True)
    text = render_report(summary_of(load).model_copy(update={"knee": 1.0}), [load])
    assert text.count("<svg") == 2 + 6
    assert "<details open>" in text
    assert "1/s: 9 completed (the knee)" in text
    assert "resident memory, MiB" in text


def test_report_escapes_what_servers_and_callers_say() -> None:
    load = measured()
    changed = ComparedMetric(load=HOSTILE, figure="p50", before=1, after=2, ratio=2, low=1.9, high=2.1, regressed=True)
    untrusted = {
        "url": HOSTILE,
        "server_version": HOSTILE,
        "models": [{"name": HOSTILE, "backend": HOSTILE, "precision": HOSTILE}],
        "entries": (MixEntry(name=HOSTILE, weight=1, fields={"prompt": HOSTILE}),),
        "notes": (HOSTILE,),
        "baseline": HOSTILE,
        "compared": (changed,),
    }
    text = render_report(summary_of(load).model_copy(update=untrusted), [load])
    assert "<script" not in text
    assert text.count(ESCAPED) >= 8
    assert "1 of 1 metrics regressed" in text


def test_report_is_deterministic() -> None:
    load = measured(samples=True)
    summary = summary_of(load)
    assert render_report(summary, [load]) == render_report(summary, [load])


def many_digits() -> LoadTestSummary:
    """Return a run with every figure as wide as it gets, at a rate that three digits would round."""
    load = LoadLevel(rate=105.47, warm_up=0, seconds=100)
    served = [
        request_record(1.0 + due / 200, 102.345, late=12.3, idle_latency=99.0, latency_target=110.0)
        for due in range(9900)
    ]
    refused = [request_record(1.0, 0.01, outcome="refused") for _ in range(1000)]
    point = summarize(load, 0, [*served, *refused], step_rows={})
    return summary_of(MeasuredLoad(point, ())).model_copy(update={"knee": load.rate})


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_digit_is_cut_in_a_narrow_terminal(width: int) -> None:
    def shown(columns: int) -> list[str]:
        console = Console(width=columns, file=io.StringIO())
        for table in metrics_tables(many_digits(), console):
            console.print(table, crop=False)
        assert isinstance(console.file, io.StringIO)
        return sorted(set(re.findall(r"\d[\d.]*(?: ?m?s|/s)?", console.file.getvalue())))

    assert shown(width) == shown(300)


def test_the_knee_has_one_name() -> None:
    """In the text, the page's table and the printed one."""
    summary = many_digits()
    page = render_report(summary, [MeasuredLoad(summary.points[0], ())])
    assert "(the knee) is 105.5/s" in page
    assert "<td>105.5/s (the knee)</td>" in page
    (table,) = metrics_tables(summary, Console(width=160))
    assert list(table.columns[0].cells) == ["105.5/s [bold]knee[/]"]
