"""The graph of an exported one that ONNX Runtime's CUDA provider loads, compared with it."""

from __future__ import annotations

from pathlib import Path

from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import Counts, rewrite
from engines.contract import GraphName
from engines.manifest import Manifest

SUFFIX = ".onnxruntime_cuda.onnx"


def make_graph(name: GraphName, manifest: Manifest, exported: Path) -> tuple[Path, Counts]:
    """Write the graph next to `exported`, since ONNX Runtime reads weights from the graph's own folder alone.

    Raises:
        EngineError: it does not compute what `exported` does.
    """
    path = exported.with_suffix(SUFFIX)
    report = rewrite(exported, path)
    try:
        check_same(name, manifest, exported, path)
    except BaseException:
        path.unlink()
        raise
    return path, report
