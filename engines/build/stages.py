"""The outermost stages of an export and of a compilation by name, so that a display can say how far a build is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from engines.backends.registry import TENSORRT
from engines.build.trajectory import CALIBRATED
from engines.checkpoints.checkpoint import Checkpoint
from engines.contract import GRAPHS, GraphName
from engines.manifest import ComputeDtype, Precision, Size

_FIRST_CALIBRATED = next(name for name in GRAPHS if name in CALIBRATED)


def export_stages(
    checkpoint: Checkpoint, dtypes: Iterable[tuple[GraphName, ComputeDtype]], size: Size
) -> Iterator[str]:
    """The stages of an export of all graphs, in FP32 and in `dtypes`."""
    typed = sorted(dtypes)
    yield "loading torch"
    if checkpoint.single_file:
        yield f"converting {checkpoint.path.name}"
    yield "reading the weights"
    yield from (f"measuring the range of {name} at {size}" for name in GRAPHS if (name, "fp16") in typed)
    for name in GRAPHS:
        yield f"exporting {name}"
        yield f"checking {name}.onnx against torch"
        for precision in [precision for graph, precision in typed if graph == name]:
            yield f"exporting {name} in {precision}"
            yield f"checking {name}.{precision}.onnx against torch"
    yield "fitting previews"


def compile_stages(backend: str, precisions: Mapping[GraphName, Precision], *, verify: bool) -> Iterator[str]:
    """The stages of compiling all engines of a backend, and of verifying them if `verify`."""
    for name in GRAPHS:
        if precisions[name] == "int8":
            if name == _FIRST_CALIBRATED:
                yield "recording trajectories to calibrate on"
            yield f"quantizing {name}"
        elif backend in TENSORRT:
            yield f"compiling {name} for {backend}"
    if verify:
        yield "drawing an image in FP32"
        yield from (f"computing {name} in FP32" for name in GRAPHS)
        yield from (f"verifying {name} of {backend}" for name in GRAPHS)
        yield f"drawing an image on {backend}"
