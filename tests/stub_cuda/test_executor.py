"""The executor over ONNX Runtime's CUDA execution provider and the stub: warm-up captures all that requests launch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.stub_cuda.conftest import Stub
from tests.stub_cuda.report import Report

pytestmark = pytest.mark.stub_cuda


@pytest.fixture(scope="module")
def bundle(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, compiled for the backend."""
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    shutil.copytree(ROOT / "engines" / "demo", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    options = ("--backend", "onnxruntime_cuda", "--precision", "fp32", "--no-verify")
    Stub(libraries, folder.parent).python("build_engines.py", "compile", str(folder), *options)
    return folder


@pytest.fixture
def report(runs: Callable[..., Report], bundle: Path) -> Report:
    return runs(bundle=str(bundle))


def test_every_call_is_captured_before_the_first_request(report: Report) -> None:
    assert report.result["uncaptured"] == 0
    assert report.faults() == []
    assert len(report.captured) >= 30, "sizes of batch, lengths of prompts and both buffers of the state"
    assert report.result["drawn"] == 3


def test_requests_launch_graphs_alone_and_wait_for_events_alone(report: Report) -> None:
    done = Counter((entry.what, entry.name) for entry in report.between("serve"))
    assert done["replay", ""] >= 8
    assert not {name for what, name in done if what in ("kernel", "plan", "begin")}, "all work is in graphs"
    assert ("allocate", "device") not in done
    assert {name for what, name in done if what == "sync"} == {"event"}
    assert {name for what, name in done if what in ("upload", "download")} <= {"pinned", "device"}
