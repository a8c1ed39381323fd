"""report.html: a run as one page that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from loadtest.results import OUTCOMES, REST, STAGES, Compared, Measured, Outcome, Point, Sample, Sent, Summary
from loadtest.svg import Axis, Bars, Mark, Series, chart, number, over, steps, up_to

_MOST_BINS = 48  # of time
_COLOURS: dict[Outcome, int] = {"completed": 0, "refused": 1, "not ready": 3, "failed": 4, "client timeout": 6}
_NO_PROCESS = "This server's /metrics says nothing of its process' CPU time and memory, so there is no picture of them."
_STYLE = """
:root{--bg:#fff;--card:#f7f7f5;--ink:#1c1c1a;--muted:#6b6a66;--line:#e3e2de;--bad:#b3261e;--good:#1a7f37;
--c0:#2a78d6;--c1:#eb6834;--c2:#1baf7a;--c3:#eda100;--c4:#e87ba4;--c5:#008300;--c6:#4a3aa7;--c7:#a8a7a2}
@media(prefers-color-scheme:dark){:root{--bg:#161615;--card:#1f1f1d;--ink:#ecebe7;--muted:#a2a19b;--line:#35342f;
--bad:#ff8a80;--good:#6fd08c;--c0:#3987e5;--c1:#d95926;--c2:#199e70;--c3:#c98500;--c4:#d55181;--c5:#35a835;
--c6:#9085e9;--c7:#6f6e69}}
:root{color-scheme:light dark}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1320px;
padding:24px}
h1{font-size:22px;margin:0}h2{font-size:18px;margin:32px 0 8px}h3{font-size:15px;margin:0 0 2px}
p{margin:4px 0}.muted,figcaption{color:var(--muted);font-size:13px}
code{background:var(--card);border:1px solid var(--line);border-radius:6px;display:block;font-size:13px;
overflow-wrap:anywhere;padding:8px 12px}
.note{border-left:3px solid var(--c3);padding-left:10px}.bad{color:var(--bad)}.good{color:var(--good)}
.grid2{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
figure{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0;padding:14px}
svg{display:block;height:auto;width:100%}svg text{fill:var(--muted);font-size:12px}svg .said{fill:var(--ink)}
svg .grid{stroke:var(--line)}svg .tick{stroke:var(--muted)}svg .mark{stroke:var(--ink);stroke-dasharray:3 4}
svg .dot{stroke:var(--card);stroke-width:2}
.legend{display:flex;flex-wrap:wrap;font-size:13px;gap:2px 14px}
.legend i{border-radius:3px;display:inline-block;height:10px;margin-right:5px;width:10px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{border-bottom:1px solid var(--line);padding:4px 8px;text-align:right;white-space:nowrap}
th{color:var(--muted);font-weight:600}th:first-child,td:first-child{text-align:left}
summary{cursor:pointer;font-size:16px;font-weight:600;padding:10px 0}
"""


def page(summary: Summary, loads: Sequence[Measured]) -> str:
    """The whole page."""
    model = summary.models[0]["name"] if summary.models else "?"
    title = f"Load on {model}, {summary.run.began[:16].replace('T', ' ')}"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            *_about(summary),
            *_compared(summary),
            *_curves(summary, [one.point for one in loads]),
            _table([one.point for one in loads]),
            "<h2>Each load</h2>",
            *(_load(summary, one, shown=_shown(summary, loads, one)) for one in loads),
            *_asked(summary),
        ]
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _about(summary: Summary) -> Iterator[str]:
    environment, models = summary.run.environment, summary.models
    served = ", ".join(f"{one['name']}, {one['backend']} in {one['precision']}" for one in models)
    release = summary.server_version or "of a version it does not tell"
    yield f'<p class="muted">{escape(f"{summary.url}: {served}, latentd {release}")}</p>'
    client = f"{environment.processor}, {environment.cores} cores, {environment.system}, Python {environment.python}"
    yield f'<p class="muted">The client ran on {escape(client)}</p>'
    yield f"<code>{escape(summary.run.command)}</code>"
    how = "given" if summary.slo_given else "4 times what each request takes on an idle server; the mean"
    yield f"<p>Good is an answer within {seconds(summary.slo)} ({how}). {_knee(summary)}</p>"
    yield from (f'<p class="note">{escape(note)}</p>' for note in summary.notes)


def _knee(summary: Summary) -> str:
    points = [point for point in summary.points if point.load.rate]
    if not points:
        return ""
    if summary.knee is None:
        return "<b>None of these rates held.</b>"
    found = f"<b>The highest rate that held was {number(summary.knee)} requests per second</b>"
    beyond = any((point.load.rate or 0) > summary.knee for point in points)
    return f"{found}; the next did not." if beyond else f"{found}, and no higher one was tried: the knee is not known."


def _curves(summary: Summary, points: Sequence[Point]) -> Iterator[str]:
    by_rate = [point for point in points if point.load.rate]
    by_users = [point for point in points if point.load.users]
    told = "From when each was due, of the completed. Where it climbs or turns back, the server has met its limit."
    beside = "Answers in time, and all answers, beside what was asked for."
    yield "<h2>All loads</h2><div class='grid2'>"
    if by_rate:
        yield _figure("Latency by throughput", told, _latency(summary, by_rate))
        yield _figure("Goodput by offered load", beside, _goodput(summary, by_rate))
    if by_users:
        yield _figure("Latency by throughput, of users who wait", told, _latency(summary, by_users))
    yield "</div>"


def _latency(summary: Summary, points: Sequence[Point]) -> str:
    told = [(point.throughput, point.latency) for point in points if point.latency]
    named = [("p50", [(x, one.p50) for x, one in told]), ("p95", [(x, one.p95) for x, one in told])]
    named.append(("p99", [(x, one.p99) for x, one in told]))
    values = [value for _, pairs in named for _, value in pairs]
    knee = next((point.throughput for point in points if point.load.rate == summary.knee is not None), None)
    marks = [Mark("y", summary.slo, f"SLO {seconds(summary.slo)}")]
    marks += [Mark("x", knee, "knee")] if knee is not None else []
    series = [Series(name, pairs, colour, "dots") for colour, (name, pairs) in enumerate(named)]
    x = up_to([point.throughput for point in points], "throughput, completed per second")
    return chart(x, over([*values, summary.slo], "latency, s"), series, marks=marks)


def _goodput(summary: Summary, points: Sequence[Point]) -> str:
    asked = [point.offered for point in points]
    series = [
        Series("offered", [(0.0, 0.0), (max(asked, default=0.0), max(asked, default=0.0))], 7, "dashes"),
        Series("throughput", [(point.offered, point.throughput) for point in points], 1, "dots"),
        Series("goodput", [(point.offered, point.goodput) for point in points], 0, "dots"),
    ]
    knee = next((point.offered for point in points if point.load.rate == summary.knee is not None), None)
    marks = [Mark("x", knee, "knee")] if knee is not None else []
    return chart(up_to(asked, "offered load, per second"), up_to(asked, "per second"), series, marks=marks)


def _table(points: Sequence[Point]) -> str:
    heads = ("load", "requests", "offered /s", "throughput /s", "goodput /s", "p50", "p90", "p95", "p99", "refused")
    rows = []
    for point in points:
        one = point.latency
        times = [seconds(value) for value in (one.p50, one.p90, one.p95, one.p99)] if one else ["–"] * 4
        rates = [f"{value:.2f}" for value in (point.offered, point.throughput, point.goodput)]
        counts = [str(point.outcomes["refused"]), str(point.other_failures)]
        late = f"{seconds(point.late.p99)}{'' if point.kept_up else ' !'}" if point.late else "–"
        rows.append([point.load.label, str(point.requests), *rates, *times, *counts, late])
    return _rows([*heads, "other failures", "client late, p99"], rows)


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _compared(summary: Summary) -> Iterator[str]:
    if summary.baseline is None:
        return
    worse = [one for one in summary.compared if one.regressed]
    yield f"<h2>Beside {escape(summary.baseline)}</h2>"
    verdict = f"{len(worse)} of {len(summary.compared)} figures are worse beyond the noise."
    yield f'<p class="{"bad" if worse else "good"}">{verdict if worse else "Nothing is worse beyond the noise."}</p>'
    yield '<p class="muted">Ratios are this run over the earlier one; in brackets the interval that 99 % of resampled '
    yield "runs lie in. Worse is an interval wholly beyond 5 %.</p>"
    cells = [
        [one.load, one.figure, _value(one, one.before), _value(one, one.after), ratio(one), _verdict(one)]
        for one in summary.compared
    ]
    yield _rows(("load", "figure", "before", "now", "ratio", ""), cells)


def _value(one: Compared, value: float) -> str:
    return seconds(value) if one.figure.startswith("p") else f"{value:.2f}/s"


def ratio(one: Compared) -> str:
    return f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})"


def _verdict(one: Compared) -> str:
    return "regressed" if one.regressed else ""


def _shown(summary: Summary, loads: Sequence[Measured], one: Measured) -> bool:
    """Unfolded are the knee and what lies farthest beyond it."""
    return one is loads[-1] or one.point.load.rate == summary.knee is not None


def _load(summary: Summary, measured: Measured, *, shown: bool) -> str:
    point, sent = measured.point, measured.requests
    parts = [
        _figure(
            "Where latency goes",
            "The share of requests that took at most so long, in all and in each stage.",
            _stages(sent),
        )
    ]
    parts.append(
        _figure("Rows per step", "Steps by the UNet rows that shared them, in the whole load.", _step_rows(point))
    )
    parts.append(
        _figure(
            "Endings over time", "By when requests were due; bars stand for callers per second.", _endings(measured)
        )
    )
    parts.append(_figure("Waiting and running", "Requests on the server, by its metrics.", _queue(point)))
    told = [sample for sample in point.samples if sample.cpu is not None]
    process = [_figure("The server's CPU", "Cores in use.", _cpu(told, point))] if len(told) > 1 else []
    known = [sample for sample in point.samples if sample.memory is not None]
    process += [_figure("The server's memory", "MiB, resident.", _memory(known, point))] if known else []
    missing = "" if process else f'<p class="muted">{_NO_PROCESS}</p>'
    inner = f'<div class="grid2">{"".join([*parts, *process])}</div>{missing}'
    counts = ", ".join(f"{count} {outcome}" for outcome, count in point.outcomes.items() if count) or "nobody came"
    head = f"{point.load.label}: {counts}" + (" (the knee)" if point.load.rate == summary.knee is not None else "")
    return f"<details{' open' if shown else ''}><summary>{escape(head)}</summary>{inner}</details>"


def _stages(sent: Sequence[Sent]) -> str:
    done = [one for one in sent if one.counted and one.outcome == "completed"]
    if not done:
        return '<p class="muted">Nothing was completed.</p>'
    named = {stage: [(one.stages or {}).get(stage, 0.0) for one in done] for stage in STAGES}
    named[REST] = [one.rest for one in done]
    least = 1e-4  # seconds: what took less is drawn there
    series = [
        Series(name, steps([max(value, least) for value in values]), colour)
        for colour, (name, values) in enumerate(named.items(), 1)
    ]
    if told := [one.to_first_step for one in done if one.to_first_step is not None]:
        series.append(Series("first step", steps(told), 7, "dashes"))
    series.insert(0, Series("latency", steps([one.latency for one in done]), 0, "area"))
    x = over([at for one in series for at, _ in one.points], "seconds")
    return chart(x, Axis("share of requests", 0.0, 1.0), series)


def _step_rows(point: Point) -> str:
    known = {rows: count for rows, count in point.step_rows.items() if count}
    if not known:
        return '<p class="muted">No step was seen.</p>'
    bars = [(rows - 0.5, rows + 0.5, (float(count),)) for rows, count in known.items()]
    most = max(point.step_rows)
    return chart(
        Axis("UNet rows", 0.5, most + 0.5), up_to(list(known.values()), "steps"), [], bars=Bars(("steps",), (0,), bars)
    )


def _endings(measured: Measured) -> str:
    load, sent = measured.point.load, measured.requests
    bins = min(max(len(sent) // 5, 8), _MOST_BINS)
    wide = load.end / bins
    counts = [dict.fromkeys(OUTCOMES, 0.0) for _ in range(bins)]
    for one in sent:
        counts[min(int(one.due / wide), bins - 1)][one.outcome] += 1 / wide
    seen = [outcome for outcome in OUTCOMES if any(count[outcome] for count in counts)]
    stacks = [
        (index * wide, (index + 1) * wide, [count[outcome] for outcome in seen]) for index, count in enumerate(counts)
    ]
    y = up_to([sum(count.values()) for count in counts], "per second")
    bars = Bars(seen, [_COLOURS[outcome] for outcome in seen], stacks)
    return chart(_time(measured.point), y, [], bars=bars, marks=_warm(measured.point))


def _queue(point: Point) -> str:
    waiting = [(sample.at, sample.waiting) for sample in point.samples]
    running = [(sample.at, sample.running) for sample in point.samples]
    y = up_to([value for _, value in (*waiting, *running)] + [1.0], "requests")
    series = [Series("waiting", waiting, 1, "area"), Series("running", running, 0)]
    return chart(_time(point), y, series, marks=_warm(point))


def _cpu(samples: Sequence[Sample], point: Point) -> str:
    pairs = [
        (later.at, max((later.cpu or 0.0) - (first.cpu or 0.0), 0.0) / (later.at - first.at))
        for first, later in pairwise(samples)
        if later.at > first.at
    ]
    y = up_to([value for _, value in pairs], "cores")
    return chart(_time(point), y, [Series("cores", pairs, 0, "area")], marks=_warm(point))


def _memory(samples: Sequence[Sample], point: Point) -> str:
    pairs = [(sample.at, (sample.memory or 0.0) / 2**20) for sample in samples]
    return chart(
        _time(point), up_to([value for _, value in pairs], "MiB"), [Series("MiB", pairs, 2, "area")], marks=_warm(point)
    )


def _time(point: Point) -> Axis:
    last = max([point.load.end, *(sample.at for sample in point.samples)])
    return Axis("seconds into the load", 0.0, last)


def _warm(point: Point) -> list[Mark]:
    """Where counting begins, and where nobody comes any more."""
    begins = [Mark("x", point.load.warm_up, "counted from here")] if point.load.warm_up else []
    return [*begins, Mark("x", point.load.end, "nobody comes")]


def _figure(title: str, text: str, picture: str) -> str:
    return f"<figure><h3>{escape(title)}</h3><figcaption>{escape(text)}</figcaption>{picture}</figure>"


def _asked(summary: Summary) -> Iterator[str]:
    yield f"<h2>What was asked for</h2><p class='muted'>Seeds follow from --seed {summary.seed}.</p>"
    cells = [
        [
            entry.name,
            f"{entry.weight:g}",
            seconds(alone),
            ", ".join(f"{name} {value!r}"[:120] for name, value in entry.fields.items()),
        ]
        for entry, alone in zip(summary.entries, summary.alone, strict=True)
    ]
    yield _rows(("entry", "weight", "on an idle server", "fields"), cells)
