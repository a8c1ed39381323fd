"""Charts as SVG."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from loadtest.charts import (
    Chart,
    ChartAxis,
    ReferenceLine,
    Series,
    StackedBars,
    cumulative,
    inline_svg,
    linear_axis,
    log_axis,
    standalone_svg,
)
from tests import ROOT

HOSTILE = "<script>alert('$x$')</script>"
LINES = Chart(
    linear_axis([4.0], "throughput, requests per second"),
    log_axis([0.1, 2.0], "latency, s"),
    [Series("p50", [(1.0, 0.1), (3.0, 0.4)], 0, "dots"), Series(HOSTILE, [(1.0, 0.0), (2.0, 2.0)], 1, "area")],
    lines=[ReferenceLine("y", 0.5, "latency target"), ReferenceLine("x", 3.0, "knee")],
)
BARS = Chart(ChartAxis("time, s", 0, 2), ChartAxis("requests", 0, 3), bars=StackedBars(("a",), (0,), [(0, 1, (2.0,))]))


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (ChartAxis("", 2, 10), ["2", "4", "6", "8", "10"]),
        (ChartAxis("", 0.09, 3, log=True), ["0.1", "0.2", "0.5", "1", "2"]),
        (ChartAxis("", 0.26, 0.39, log=True), ["0.26", "0.28", "0.3", "0.32", "0.34", "0.36", "0.38"]),
        (ChartAxis("", 0.5, 2000, log=True), ["1", "10", "100", "1000"]),
    ],
    ids=["linear", "log", "narrow log", "wide log"],
)
def test_axes_have_round_ticks(axis: ChartAxis, ticks: list[str]) -> None:
    shown = texts(standalone_svg([Chart(axis, ChartAxis("", 0, 1))]))
    assert shown[: shown.index("0")] == ticks  # the other axis follows


def test_distribution_ends_at_one() -> None:
    assert cumulative([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]
    assert cumulative([]) == []
    assert cumulative([float(value) for value in range(10_000)])[-1] == (9999.0, 1.0)
    assert len(cumulative([float(value) for value in range(10_000)])) < 1000


def test_charts_have_labels_legend_and_reference_lines() -> None:
    shown = texts(inline_svg(LINES, name="a"))
    assert {"throughput, requests per second", "latency, s", "p50", HOSTILE, "latency target", "knee"} <= set(shown)
    assert "steps" not in texts(inline_svg(BARS, name="a"))  # no legend for one entry


def test_names_are_escaped() -> None:
    for svg in (inline_svg(LINES, name="a"), standalone_svg([LINES])):
        assert "<script" not in svg
        assert "&lt;script&gt;" in svg


def test_marks_have_tooltips() -> None:
    assert "<title>p50: 0.4 at 3</title>" in inline_svg(LINES, name="a")
    assert "<title>a: 2, 0 to 1</title>" in inline_svg(BARS, name="a")


def test_points_beyond_the_axes_are_not_drawn() -> None:
    far = Chart(ChartAxis("a", 0, 1), ChartAxis("b", 0, 1), [Series("p50", [(0.5, 0.5), (0.6, 1e6)], 0, "dots")])
    assert {"a", "b"} <= set(texts(inline_svg(far, name="a")))


def test_inline_charts_have_the_page_colours_and_their_own_ids() -> None:
    one, other = (inline_svg(LINES, name=name) for name in ("one", "other"))
    assert "var(--c0, #2a78d6)" in one
    assert re.findall(r"[:\s]#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", one)) == []
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', one)) != set()
    assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', one)} <= ids[0]


def test_output_is_deterministic() -> None:
    assert inline_svg(LINES, name="a") == inline_svg(LINES, name="a")
    assert standalone_svg([LINES, BARS]) == standalone_svg([LINES, BARS])
    assert not re.search(r"\d{4}-\d\d-\d\d|Matplotlib", standalone_svg([LINES]))


def test_charts_without_points_are_drawn() -> None:
    empty = Chart(linear_axis([], "a"), log_axis([], "b"), [Series("p50", [], 0, "dots")])
    assert {"a", "b"} <= set(texts(inline_svg(empty, name="a")))
    assert standalone_svg([]).startswith("<svg")


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import loadtest.__main__, sys; sys.exit(any(name in sys.modules for name in ('matplotlib', 'jinja2')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)  # noqa: S603 - our own
    code = "import sys; from tests.loadtest.test_charts import *; inline_svg(BARS, name='a')"
    code += "; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)  # noqa: S603 - our own
