"""A checkpoint becomes checked ONNX graphs and a tokenizer."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from engines.accuracy import AccuracyError, check_finite, tolerance, worst_difference
from engines.backends.host import HostBuffer
from engines.backends.onnxruntime import open_device
from engines.checkpoints.adapters.embedding import LearnedToken
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.loading.modules import Modules, load_tokenizer, second_pad
from engines.contract import LORA_GRAPHS, PIXEL_GRAPHS, Array, GraphName, plain
from engines.export.lora_graph import add_updates
from engines.export.trace import DTYPES, ExportError, Traced, largest_value, to_onnx, traced_graphs
from engines.export.weights import promoted, save_reference, save_typed, save_variant
from engines.files import write_atomically
from engines.manifest import MANIFEST, ComputeDtype, Difference, File, Graph, LoraLayer, Onnx, Size, Storage, Tokenizer
from engines.progress import Progress

_FP16_ENDS = 65504.0
_MUCH = 2**30  # bytes of weights, of which memory shall not hold further copies


def export_graphs(  # noqa: PLR0913 - what decides the graphs, by keyword
    config: CheckpointConfig,
    modules: Modules,
    out: Path,
    *,
    storage: Storage,
    typed: Sequence[tuple[GraphName, ComputeDtype]],
    size: Size,
    known: dict[GraphName, Graph],
    layers: Sequence[LoraLayer] = (),
    exceeding: Collection[GraphName] = (),
    progress: Progress,
) -> dict[GraphName, Graph]:
    """Write every graph in FP32, and those of `typed` in that precision, to folder `out`, except those in `known`.

    With `layers` that LoRAs update, the variants for LoRAs are among them.

    Graphs that compute in FP16 are checked first to stay within its range at `size`. Those of the VAE that do not, or
    are known to be `exceeding` it, compute in BF16 instead, with a note.

    Raises:
        ExportError: a graph differs from torch, or leaves FP16's range and is not the VAE's.
    """
    traced = traced_graphs(modules, config.latent, config.context, layers)
    exports = {
        name: _Variant(name, graph, out, progress, layers=layers)
        if name in LORA_GRAPHS.values()
        else _Export(name, graph, out, progress)
        for name, graph in traced.items()
    }
    wanted = {name: [precision for graph, precision in typed if graph == name] for name in traced}
    for name, one in exports.items():  # of all, before minutes go into the first
        one.check_finite()
        wanted[name] = one.within_range(known.get(name), wanted[name], size, exceeds=name in exceeding)
    return {name: one.every_precision(known.get(name), storage, wanted[name]) for name, one in exports.items()}


def export_tokenizer(config: CheckpointConfig, words: Sequence[LearnedToken], out: Path) -> Tokenizer:
    """Write the checkpoint's tokenizer, with the learned tokens `words`, to one `tokenizer.json` in folder `out`."""
    tokenizer = load_tokenizer(config, words)
    path = out / "tokenizer.json"
    write_atomically(path, tokenizer.backend_tokenizer.to_str().encode())
    return Tokenizer(
        file=File.of(path, root=out),
        pad=tokenizer.pad_token_id,
        pad_2=second_pad(config),
        embeddings={word.token: word.vectors for word in words},
    )


class _Export:
    """The export of one graph, in several precisions."""

    def __init__(self, name: GraphName, traced: Traced, out: Path, progress: Progress) -> None:
        self._name = name
        self._traced = traced
        self._out = out
        self._progress = progress
        self._inputs = traced.random_inputs()
        self._expected = traced.compute(self._inputs)
        self._exceeds = False

    def check_finite(self) -> None:
        """Raise ExportError if torch itself computes NaN or infinity, with which every comparison would agree."""
        try:
            check_finite(self._expected)
        except AccuracyError as error:
            raise ExportError(
                f"{self._name} computes no finite values in torch in FP32 ({error}): the checkpoint's weights are "
                "damaged, or overflow; download it again."
            ) from error

    def within_range(
        self, known: Graph | None, typed: Sequence[ComputeDtype], size: Size, *, exceeds: bool
    ) -> list[ComputeDtype]:
        """The precisions `typed`, with BF16 in place of FP16 where a graph of the VAE leaves its range at `size`.

        Raises:
            ExportError: another graph does.
        """
        self._exceeds = self._name in PIXEL_GRAPHS and (exceeds or bool(known and known.exceeds_fp16))
        if "fp16" in typed and not self._exceeds and not (known and "fp16" in known.onnx):
            self._check_range(size)
        if not self._exceeds:
            return list(typed)
        return list(dict.fromkeys("bf16" if precision == "fp16" else precision for precision in typed))

    def _check_range(self, size: Size) -> None:
        if not (reason := self._large_weight() or self._large_value(size)):
            return
        if self._name not in PIXEL_GRAPHS:
            raise ExportError(f"{reason}: build it with --precision bf16, or fp32.")
        self._exceeds = True
        self._progress.note(f"{reason}: it computes in BF16 where the others compute in FP16")

    def _large_value(self, size: Size) -> str | None:
        """What leaves FP16's range within the graph, if anything does."""
        latent = self._traced.latent
        shape = {"h": size.height // latent.downscale, "w": size.width // latent.downscale}
        pixels = {"H": size.height, "W": size.width}
        with self._progress.stage(f"measuring the range of {self._name} at {size}"):
            inputs = self._traced.random_inputs(S=1, C=1, B=1, R=1, N=1, n=1, **shape, **pixels)
            largest = largest_value(self._traced, inputs)
        if largest < _FP16_ENDS:  # infinite where it is NaN
            return None
        return f"{self._name} reaches {largest:.0f} at {size}, and FP16 ends at {_FP16_ENDS:.0f}"

    def _large_weight(self) -> str | None:
        """The weight that leaves FP16's range, if one does."""
        for name, weight in self._traced.module.named_parameters():
            low, high = map(float, weight.detach().aminmax())
            if max(-low, high) > _FP16_ENDS:
                return f"{name} of {self._name} reaches {max(-low, high):.0f}, and FP16 ends at {_FP16_ENDS:.0f}"
        return None

    def every_precision(self, known: Graph | None, storage: Storage, typed: Sequence[ComputeDtype]) -> Graph:
        onnx: dict[ComputeDtype, Onnx] = dict(known.onnx) if known else {}
        for precision in ("fp32", *typed):
            if precision not in onnx:
                onnx[precision] = self._made(precision, storage)
        return Graph(inputs=self._traced.inputs, outputs=self._traced.outputs, onnx=onnx, exceeds_fp16=self._exceeds)

    def _made(self, precision: ComputeDtype, storage: Storage) -> Onnx:
        path = _path(self._out, self._name, precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        if precision == "fp32":
            (self._out / MANIFEST).unlink(missing_ok=True)  # it lists the hash of the graph that is replaced
        suffix = "" if precision == "fp32" else f" in {precision}"
        with self._progress.stage(f"exporting {self._name}{suffix}"):
            files = self._write(path, precision, storage)
        return self._checked(files, storage if precision == "fp32" else precision)

    def _write(self, path: Path, precision: ComputeDtype, storage: Storage) -> tuple[Path, ...]:
        if precision == "fp32":
            return save_reference(to_onnx(self._traced), path, storage=storage)
        model = to_onnx(self._traced, DTYPES[precision])
        files = save_typed(model, path, reference=_path(self._out, self._name, "fp32"))
        del model
        gc.collect()  # its cycles hold copies of weights
        return files

    def _checked(self, files: Sequence[Path], precision: ComputeDtype) -> Onnx:
        """Run the written graph in ONNX Runtime. Raises ExportError where it strays from torch in FP32."""
        with self._progress.stage(f"checking {files[0].name} against torch"):
            difference = self._difference(files[0], precision)
        allowed = tolerance(precision, self._traced.outputs)
        if not difference.largest <= allowed:  # NaN fails too
            raise ExportError(
                f"{files[0].name} differs from torch by {difference.largest:.1e} of its range, more than {allowed:.0e}."
            )
        return Onnx(files=tuple(File.of(file, root=self._out) for file in files), difference=difference)

    def _difference(self, path: Path, precision: ComputeDtype) -> Difference:
        outputs = self._run(path, precision)
        try:
            check_finite(outputs)
            return worst_difference(outputs, self._expected)
        except AccuracyError as error:
            wider = {"fp16": "bf16, or fp32", "bf16": "fp32"}.get(precision)
            remedy = f"build it with --precision {wider}" if wider else "build it with --force"
            raise ExportError(f"{path.name} computes no finite values, and torch does ({error}): {remedy}.") from error

    def _run(self, path: Path, precision: ComputeDtype) -> dict[str, Array]:
        if precision != "bf16":
            return self._run_onnx(path)
        with TemporaryDirectory() as folder:  # no runtime on a CPU computes in BF16: FP32 over the rounded weights
            wide = Path(folder) / path.name
            promoted(path, out=wide)
            return self._run_onnx(wide)

    def _run_onnx(self, path: Path) -> dict[str, Array]:
        weights = path.with_name(f"{plain(self._name)}.weights")
        device = open_device(threads=0, is_frugal=weights.exists() and weights.stat().st_size > _MUCH)
        stream = device.stream("check")
        inputs = {name: HostBuffer(value.contiguous().numpy()) for name, value in self._inputs.items()}
        outputs = {name: device.allocate(right.shape, right.dtype) for name, right in self._expected.items()}
        device.load(path, stream).bind({**inputs, **outputs}).launch()
        return {name: stream.read(buffer).result() for name, buffer in outputs.items()}


class _Variant(_Export):
    """The export of a graph that applies LoRAs: the plain graph of the same bundle with nodes added."""

    def __init__(
        self, name: GraphName, traced: Traced, out: Path, progress: Progress, *, layers: Sequence[LoraLayer]
    ) -> None:
        super().__init__(name, traced, out, progress)
        self._plain = plain(name)
        self._layers = layers

    def _check_range(self, size: Size) -> None:
        """Nothing is refused: the weights are those of the plain graph, and LoRAs are not known yet."""

    def _write(self, path: Path, precision: ComputeDtype, storage: Storage) -> tuple[Path, ...]:  # noqa: ARG002 - as above
        model = ir.load(_path(self._out, self._plain, precision))
        add_updates(model, self._layers, inputs=self._traced.inputs, computes_in=precision)
        return save_variant(model, path, weights=_path(self._out, self._plain, "fp32").with_suffix(".weights"))


def _path(out: Path, name: GraphName, precision: ComputeDtype) -> Path:
    suffix = "" if precision == "fp32" else f".{precision}"
    return out / "onnx" / f"{name}{suffix}.onnx"
