"""Real builds of a small graph by TensorRT for RTX, which need no GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from engines.build.trt.parent import build_engine
from engines.progress import NullProgress
from tests.engines.build.trt.block import CHANNELS, SIDE, draw, rows
from tests.engines.build.trt.builds import RTX, Built


def test_every_attention_and_group_norm_is_one_kernel_in_every_profile(built: Built) -> None:
    layers = built.report.layers
    assert layers is not None
    assert (layers["attentions"], layers["fused_attentions"]) == (1, 1)
    assert (layers["group_norms"], layers["fused_group_norms"]) == (2, 2)  # and the LayerNorm is not one
    assert 5 < layers["total"] < 40  # one profile's, not both's
    assert layers["precisions"]["Half"] > layers["precisions"].get("Float", 0)
    assert sum(layers["precisions"].values()) <= layers["total"]


def test_the_engine_takes_the_place_of_the_older_one_and_nothing_else_is_left(built: Built) -> None:
    content = built.out.read_bytes()
    assert 2 * 4 * CHANNELS**2 < len(content) < 20_000_000  # its weights, at two bytes each, at least
    assert hashlib.sha256(content).digest() != hashlib.sha256(b"an older engine").digest()
    assert list(built.out.parent.iterdir()) == [built.out]


def test_the_report_has_the_time_and_memory_of_the_build(built: Built) -> None:
    assert 0 < built.report.seconds < 60
    assert 50e6 < built.report.memory < 2e9  # the child's own: this process has torch in it
    assert built.report.activations is None or all(built.report.activations)
    assert built.progress.notes == []


def test_every_phase_of_tensorrt_is_reported_to_its_end(built: Built) -> None:
    stages = built.progress.stages
    names = [stage.name for stage in stages]
    assert (names[0], names[1], names[-1]) == ("Reading the graph", "Building engine", "Writing the engine")
    assert all(stage.ended for stage in stages)
    assert max(len(stage.updates) for stage in stages) > 20
    for stage in stages:
        done = [done for done, _ in stage.updates]
        assert done == sorted(done)
        assert all(0 <= done <= total for done, total in stage.updates)


def test_attention_in_fp32_is_reported_as_not_fused(tmp_path: Path) -> None:
    path = draw(tmp_path / "fp32.onnx", dtype=np.float32)
    layers = build_engine(RTX, path, tmp_path / "fp32.engine", [rows(2)], progress=NullProgress()).layers
    assert layers is not None
    assert (layers["attentions"], layers["fused_attentions"]) == (1, 0)
    assert "Half" not in layers["precisions"]


def test_the_report_is_of_the_profile_with_the_fewest_fusions(tmp_path: Path) -> None:
    path = draw(tmp_path / "any_size.onnx", side="side")
    profiles = [rows(2), rows(2, SIDE, 2 * SIDE)]
    layers = build_engine(RTX, path, tmp_path / "any_size.engine", profiles, progress=NullProgress()).layers
    assert layers is not None
    assert (layers["group_norms"], layers["fused_group_norms"]) == (2, 0)


def test_a_build_does_not_depend_on_the_working_directory(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engines").mkdir()
    for shadow in ("engines/__init__.py", "json.py"):
        (tmp_path / shadow).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    build_engine(RTX, graph, Path("here.engine"), [rows(1)], progress=NullProgress())
    assert (tmp_path / "here.engine").stat().st_size > 1_000_000
