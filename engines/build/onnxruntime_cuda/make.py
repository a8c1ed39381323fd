"""The graph of an exported one that ONNX Runtime's CUDA provider loads, compared with it."""

from __future__ import annotations

from pathlib import Path

from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import Counts, rewrite
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import FusionReport, Manifest

SUFFIX = ".onnxruntime_cuda.onnx"


def make_graph(name: GraphName, manifest: Manifest, exported: Path) -> tuple[Path, FusionReport]:
    """Write the graph next to `exported`, since ONNX Runtime reads weights from the graph's own folder alone.

    Raises:
        EngineError: it does not compute what `exported` does.
    """
    path = exported.with_suffix(SUFFIX)
    counts = rewrite(exported, path)
    try:
        check_same(name, manifest, exported, path)
    except EngineError:
        path.unlink()
        raise
    return path, _report(counts)


def _report(counts: Counts) -> FusionReport:
    (fused_attentions, attentions), (fused_group_norms, group_norms) = counts.attentions, counts.group_norms
    channels_last, convolutions = counts.convolutions
    return FusionReport(
        total=counts.operators,
        attentions=attentions,
        fused_attentions=fused_attentions,
        group_norms=group_norms,
        fused_group_norms=fused_group_norms,
        convolutions=convolutions,
        channels_last=channels_last,
    )
