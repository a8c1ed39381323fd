"""The safety checker in a bundle: verified like every graph, in FP16 for GPUs, and left out on request."""

from __future__ import annotations

from pathlib import Path

import build_engines
from engines.accuracy import tolerance
from engines.contract import GRAPHS
from engines.manifest import Manifest


def test_it_is_verified_like_every_graph(checked_bundle: Path) -> None:
    manifest = Manifest.load(checked_bundle)
    assert manifest.graph_names == (*GRAPHS, "safety")
    assert tuple(manifest.builds["onnxruntime"].engines) == (*GRAPHS, "safety")
    assert manifest.builds["onnxruntime"].engines["safety"].difference


def test_it_is_exported_in_fp16_for_gpus(checked_checkpoint: Path, tmp_path: Path) -> None:
    source = ["--model", str(checked_checkpoint), "--out", str(tmp_path)]
    assert build_engines.main(["export", *source, "--backend", "tensorrt", "--rows", "2"]) == 0
    graph = Manifest.load(tmp_path).graphs["safety"]
    assert graph.onnx["fp16"].difference.largest < tolerance("fp16", graph.outputs)


def test_it_can_be_left_out(checked_checkpoint: Path, tmp_path: Path) -> None:
    source = ["--model", str(checked_checkpoint), "--out", str(tmp_path), "--no-safety-checker"]
    assert build_engines.main(["export", *source, "--backend", "onnxruntime", "--rows", "2"]) == 0
    assert Manifest.load(tmp_path).graph_names == GRAPHS
