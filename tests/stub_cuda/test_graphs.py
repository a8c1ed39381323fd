"""The demo model's graphs on ONNX Runtime's CUDA execution provider: what it allocates, captures, copies and launches.

Kernels do nothing here, so these tests know nothing of numbers, of speed, or of what cuDNN and cuBLAS take themselves.
Bounds are a tenth above what was found, with onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.build.onnxruntime_cuda.make import SUFFIX
from engines.build.onnxruntime_cuda.rewrite import rewrite
from tests import ROOT
from tests.stub_cuda.report import Report

pytestmark = pytest.mark.stub_cuda

ONNX = ROOT / "engines" / "demo" / "onnx"
DENOISE = str(ONNX / "denoise.onnx")
LARGE_FIRST = (8, 4, 2)
SMALL_FIRST = (2, 4, 8)
LARGER = (64, 256)  # sides at which blocks are so large that they are not reused for smaller ones
Runs = Callable[..., Report]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the graphs as they are built for the backend."""
    folder = tmp_path_factory.mktemp("fused") / "onnx"
    shutil.copytree(ONNX, folder)
    for graph in folder.glob("*.onnx"):
        rewrite(graph, graph.with_suffix(SUFFIX))
    return folder


def check(report: Report, *, kernels: int, megabytes: float) -> None:
    """Check that the graph runs on the GPU alone, that every call is captured, and that it stays within its bounds."""
    assert report.nodes_on_cpu() == set()
    assert report.result["copies"] == 0
    assert (len(report.captured), report.result["uncaptured"]) == (report.result["calls"], 0)
    assert report.faults() == []
    assert report.replayed() == {"replay": report.result["calls"]}, "one launch for each, which waits for nothing"
    assert report.kernels <= kernels
    assert report.arena <= megabytes * 1e6


@pytest.mark.parametrize(
    ("graph", "kernels", "megabytes"),
    [
        ("denoise", 840, 10.8),
        ("denoise_shallow", 104, 3.8),
        ("encode_prompt", 93, 1.9),
        ("encode_image", 188, 14.8),
        ("decode", 281, 43.7),
    ],
)
def test_an_exported_graph(runs: Runs, graph: str, kernels: int, megabytes: float) -> None:
    check(runs(graph=str(ONNX / f"{graph}.onnx")), kernels=kernels, megabytes=megabytes)


@pytest.mark.parametrize(
    ("graph", "kernels", "megabytes"),
    [
        ("denoise", 620, 12.6),
        ("denoise_shallow", 89, 4.4),
        ("encode_prompt", 82, 2.1),
        ("encode_image", 106, 14.8),
        ("decode", 159, 42.5),
    ],
)
def test_a_graph_with_fused_operators(runs: Runs, fused: Path, graph: str, kernels: int, megabytes: float) -> None:
    check(runs(graph=str(fused / f"{graph}{SUFFIX}")), kernels=kernels, megabytes=megabytes)


def test_a_graph_whose_attention_is_not_fused_exceeds_the_bounds_of_one_that_is(runs: Runs, fused: Path) -> None:
    bounds: dict[str, Any] = {"kernels": 530, "megabytes": 165}
    check(runs(graph=str(fused / f"denoise{SUFFIX}"), sides=LARGER), **bounds)
    plain = runs(graph=DENOISE, sides=LARGER)
    assert plain.kernels > bounds["kernels"]
    assert plain.arena > 1.9 * bounds["megabytes"] * 1e6


def test_all_memory_is_that_of_the_largest_rows_when_those_come_first(runs: Runs) -> None:
    largest, all_rows = (runs(graph=DENOISE, sides=LARGER, rows=rows).arena for rows in ((8,), LARGE_FIRST))
    assert largest == all_rows


# That the checks can fail


def test_rows_from_small_to_large_take_more_memory(runs: Runs) -> None:
    small_first, large_first = (
        runs(graph=DENOISE, sides=LARGER, rows=rows).arena for rows in (SMALL_FIRST, LARGE_FIRST)
    )
    assert small_first >= 1.4 * large_first


def test_memory_patterns_take_more_memory(runs: Runs) -> None:
    assert runs(graph=DENOISE, memory_pattern=True).arena >= 1.6 * runs(graph=DENOISE).arena


def test_layouts_that_onnx_runtime_changes_itself_add_copies_that_forbid_captures(runs: Runs) -> None:
    report = runs(graph=DENOISE, provider=(("prefer_nhwc", "1"),), rows=(2,), launches=False)
    assert report.result["copies"] >= 100
    assert report.result["uncaptured"] == report.result["calls"] == 2


def test_without_captures_every_launch_waits_and_other_rows_need_new_plans(runs: Runs) -> None:
    report = runs(graph=DENOISE, captures=False)
    plans = [
        sum(entry.what == "plan" for entry in report.between(mark)) for mark in ("warm up 8", "warm up 4", "replay")
    ]
    assert plans == [50, 50, 150], "one for each convolution, whenever the rows change"
    assert report.replayed()["kernel"] >= 6 * 700
    assert report.captured == {}


def test_what_must_not_be_in_a_capture_is_found(runs: Runs) -> None:
    report = runs()
    assert report.faults() == [
        "a capture was invalidated",
        "a graph copies from memory that changed",
        "a graph copies from pageable memory",
        "allocate of device in a capture",
        "free of device in a capture",
        "sync of stream in a capture",
    ]
    replays = [entry.name for entry in report.entries if entry.what == "replay"]
    assert replays == ["", "stale"], "before and after the memory changed"
    assert list(report.captured) == [1], "the others are invalid"
