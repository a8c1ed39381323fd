"""The graphs in FP8 and INT8 of a bundle: each is made once, serves every TensorRT, and is compared with FP32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from engines.accuracy import tolerance, worst_difference, worst_of
from engines.build.qdq.quantize import EightBits, quantize
from engines.build.trajectory import GraphRunner, finite, reference, reference_device
from engines.contract import Array, GraphName
from engines.errors import EngineError
from engines.files import write_atomically
from engines.held import are_intact
from engines.manifest import ComputeDtype, Difference, File, Manifest, Onnx
from engines.progress import Progress

_COMPARED = 6  # calls of the recording
_DTYPES: tuple[ComputeDtype, ...] = ("fp16", "fp32")

Recordings = Callable[[], Mapping[GraphName, Sequence[Mapping[str, Array]]]]


class _Record(Onnx):
    """What was made, and the key of what it was made from."""

    key: str


class QuantizedGraphs:
    """Makes the graphs in eight bits of one bundle."""

    def __init__(self, manifest: Manifest, bundle: Path, recordings: Recordings, progress: Progress) -> None:
        """`recordings` returns the inputs of the UNet's graphs along some trajectories; called if they are needed."""
        self._manifest = manifest
        self._bundle = bundle
        self._recordings = recordings
        self._progress = progress

    def graph(self, name: GraphName, precision: EightBits, *, key: str) -> Onnx:
        """The graph of that name in eight bits, of an earlier build if it has the same `key`.

        Its difference is that from the FP32 graph along the recording, in ONNX Runtime on this machine's processor.

        Raises:
            EngineError: ModelOpt is not installed, or the graph computes something else than in FP32.
        """
        out = self._bundle / self._exported(name, "fp32").with_name(f"{name}.{precision}.onnx")
        record_file = out.with_suffix(".json")
        if cached := _cached(record_file, key, self._bundle):
            return cached
        made = self._made(name, precision, out, key=key)
        write_atomically(record_file, made.model_dump_json(indent=2).encode())
        return made

    def _made(self, name: GraphName, precision: EightBits, out: Path, *, key: str) -> _Record:
        recording = self._recordings()[name]
        source, reference_file = (self._bundle / self._exported(name, dtype) for dtype in _DTYPES)
        with self._progress.stage(f"quantizing {name} to {precision}"):
            paths = quantize(source, out, reference=reference_file, precision=precision, recording=recording)
        with self._progress.stage(f"comparing {name} in {precision} with FP32 on the CPU"):
            found = self._difference(name, out, recording[:: max(len(recording) // _COMPARED, 1)])
        self._check(name, precision, found)
        return _Record(files=tuple(File.of(path, root=self._bundle) for path in paths), difference=found, key=key)

    def _difference(self, name: GraphName, path: Path, cases: Sequence[Mapping[str, Array]]) -> Difference:
        graphs = reference(self._manifest, self._bundle)
        expected = [graphs(name, inputs) for inputs in cases]
        del graphs  # memory never holds the model twice
        runner = finite(
            GraphRunner(self._manifest, reference_device(self._manifest), {name: path}),
            lambda graph: f"{graph} does not bear eight bits; compile it with --precision fp16",
        )
        return worst_of(
            worst_difference(runner(name, inputs), outputs) for inputs, outputs in zip(cases, expected, strict=True)
        )

    def _check(self, name: GraphName, precision: EightBits, found: Difference) -> None:
        allowed = tolerance(precision, self._manifest.graphs[name].outputs)
        self._progress.note(
            f"{name} in {precision} differs from FP32 by {found.mean:.1e} of its range, {found.largest:.1e} at most"
        )
        if not found.largest <= allowed:
            raise EngineError(
                f"{name} in {precision} differs from FP32 by {found.largest:.1e} of its range, more than "
                f"{allowed:.0e}: its images would not be the model's; compile it with --precision fp16."
            )

    def _exported(self, name: GraphName, dtype: ComputeDtype) -> Path:
        """The file of an exported graph, relative to the bundle."""
        return Path(self._manifest.graphs[name].onnx[dtype].files[0].path)


def _cached(record_file: Path, key: str, bundle: Path) -> _Record | None:
    try:
        made = _Record.model_validate_json(record_file.read_bytes())
    except (OSError, ValidationError):
        return None
    return made if made.key == key and are_intact(bundle, made.files) else None
