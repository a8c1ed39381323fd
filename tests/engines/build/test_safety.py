"""The safety checker in a bundle: verified like every graph, in FP16 for GPUs, and left out on request."""

from __future__ import annotations

import shutil
from pathlib import Path

import build_engines
from engines.accuracy import tolerance
from engines.build.compile import required_dtypes
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import load_modules
from engines.contract import GRAPHS
from engines.export.run import export_graphs
from engines.manifest import Manifest, Size
from engines.progress import NullProgress
from tests.support.shared import reused_graphs
from tests.support.tiny import SIDE


def test_it_is_verified_like_every_graph(checked_bundle: Path) -> None:
    manifest = Manifest.load(checked_bundle)
    assert manifest.graph_names == (*GRAPHS, "safety")
    assert tuple(manifest.builds["onnxruntime"].engines) == (*GRAPHS, "safety")
    assert manifest.builds["onnxruntime"].engines["safety"].difference


def test_it_is_exported_in_fp16_for_gpus(checked_checkpoint: Path, checked_bundle: Path, tmp_path: Path) -> None:
    graphs = Manifest.load(checked_bundle).graphs
    assert ("safety", "fp16") in required_dtypes("tensorrt", None, graphs=(*GRAPHS, "safety"))
    out = Path(shutil.copytree(checked_bundle, tmp_path / "bundle"))
    checkpoint = find_checkpoint(str(checked_checkpoint))
    made = export_graphs(
        checkpoint.config,
        load_modules(checkpoint.config, checkpoint),
        out,
        storage="fp32",
        typed=[("safety", "fp16")],
        size=Size(width=SIDE, height=SIDE),
        known=dict(graphs),
        progress=NullProgress(),
    )
    assert made["safety"].onnx["fp16"].difference.largest < tolerance("fp16", made["safety"].outputs)


def test_it_can_be_left_out(checked_checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    source = ["--model", str(checked_checkpoint), "--out", str(tmp_path), "--no-safety-checker"]
    with reused_graphs(bundle, tmp_path, *GRAPHS):
        assert build_engines.main(["export", *source, "--backend", "onnxruntime", "--rows", "2"]) == 0
    assert Manifest.load(tmp_path).graph_names == GRAPHS
