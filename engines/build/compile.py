"""Compiles the engines of one backend from the ONNX graphs of a bundle; needs no torch.

Engines of an earlier build are reused if their key and their files are unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from engines.backends.available import gpu_here, installed
from engines.backends.registry import ON_CPU, ONNXRUNTIME_CUDA, SPECS, TENSORRT, install_command
from engines.build.keys import engine_key, quantized_key
from engines.build.profiles import Shapes, shapes
from engines.build.qdq.graphs import QuantizedGraphs
from engines.build.qdq.quantize import EIGHT_BITS, EightBits, modelopt_version
from engines.build.trajectory import CALIBRATED, record
from engines.build.trt.parent import build_engine
from engines.contract import DECODERS, GRAPHS, LORA_GRAPHS, PIXEL_GRAPHS, PLAIN_STEPS, STEPS, Array, GraphName
from engines.errors import EngineError
from engines.files import write_atomically
from engines.held import are_intact
from engines.manifest import Build, Compiled, ComputeDtype, File, FusionReport, Gpu, Manifest, Onnx, Precision, Profile
from engines.progress import Progress

_Maker = Callable[..., Compiled]  # of a graph's name, precision and ONNX file, and its key

# TensorRT's own. Higher ones take several times as long, which a server that compiles at its first start waits for;
# what they gain depends on the GPU, and is not yet measured on one.
OPTIMIZATION_LEVEL = 3


def check_precision(backend: str, precision: Precision | None) -> None:
    """Raise EngineError, with the precisions there are, unless `backend` computes in `precision`."""
    offered = SPECS[backend].precisions
    if precision and precision not in offered:
        hint = " Its weights can be stored in half the space with --weights fp16." if precision == "fp16" else ""
        raise EngineError(f"{backend} computes in {' or '.join(offered)}, not in {precision}.{hint}")


def engine_precisions(
    backend: str,
    precision: Precision | None,
    *,
    exceeding: Collection[GraphName] = (),
    graphs: Sequence[GraphName] = GRAPHS,
) -> dict[GraphName, Precision]:
    """The precision that each engine of `backend` computes in.

    FP8 and INT8 on GPUs apply to the UNet, and FP16 to the rest of it and to the other graphs. INT8 on CPUs applies to
    all graphs, in some of them to the weights alone. BF16 applies to the graphs that take the time: the UNet, and on a
    CPU the decoders too. Their other graphs compute in FP16 on GPUs, since they stay within its range and it keeps
    more digits, and in FP32 on CPUs. Eight bits leave the safety checker as it is, whose verdicts depend on small
    differences, and the graphs that apply LoRAs: their calibration would have to know the LoRAs.

    Of a VAE that leaves FP16's range, the graphs compute in BF16 where they would in FP16, whatever the UNet computes
    in; in FP32 where the backend has no BF16.

    Args:
        backend: the backend's name.
        precision: the requested precision; None: the best for the backend and the model.
        exceeding: the graphs that leave the range of FP16.
        graphs: the model's graphs.

    Raises:
        EngineError: the backend does not compute in `precision`, or the model does not.
    """
    check_precision(backend, precision)
    unet_exceeds = not set(STEPS).isdisjoint(exceeding)
    chosen = precision or _default_precision(backend, prefers_bf16=unet_exceeds)
    precisions = _precisions(backend, chosen, graphs, unet_exceeds=unet_exceeds)
    wide: Precision = "bf16" if "bf16" in SPECS[backend].precisions else "fp32"
    widened = {name: wide for name in PIXEL_GRAPHS if name in exceeding and precisions.get(name) == "fp16"}
    return precisions | widened


def _precisions(
    backend: str, chosen: Precision, graphs: Sequence[GraphName], *, unet_exceeds: bool
) -> dict[GraphName, Precision]:
    """As `engine_precisions`, of models whose VAE stays within FP16's range."""
    if chosen in EIGHT_BITS and backend in TENSORRT:
        if unet_exceeds:
            raise EngineError(
                f"{chosen} leaves a part of the UNet in FP16, whose range this model exceeds: use --precision bf16."
            )
        return {name: chosen if name in PLAIN_STEPS else "fp16" for name in graphs}
    if chosen == "int8":
        exact = ("safety", *LORA_GRAPHS.values())
        return {name: "fp32" if name in exact else chosen for name in graphs}
    if chosen != "bf16":
        return dict.fromkeys(graphs, chosen)
    if backend in ON_CPU:
        return {name: chosen if name in (*STEPS, *DECODERS.values()) else "fp32" for name in graphs}
    return {name: chosen if name in STEPS else "fp16" for name in graphs}


def required_dtypes(
    backend: str,
    precision: Precision | None,
    *,
    exceeding: Collection[GraphName] = (),
    graphs: Sequence[GraphName] = GRAPHS,
) -> frozenset[tuple[GraphName, ComputeDtype]]:
    """The `graphs` that `backend` requires in another dtype than FP32, each with that dtype. Raises EngineError."""
    precisions = engine_precisions(backend, precision, exceeding=exceeding, graphs=graphs)
    dtypes = {name: _graph_dtype(backend, engine_precision) for name, engine_precision in precisions.items()}
    return frozenset((name, dtype) for name, dtype in dtypes.items() if dtype != "fp32")


def _graph_dtype(backend: str, precision: Precision) -> ComputeDtype:
    """The dtype of the ONNX graph that an engine is compiled from, or quantized from: other layers keep it."""
    if precision in ("fp32", "fp16", "bf16"):
        return precision
    return "fp16" if backend in TENSORRT else "fp32"


def _default_precision(backend: str, *, prefers_bf16: bool) -> Precision:
    """BF16 for models that prefer it, on GPUs alone: on CPUs FP32 has the range."""
    offered = SPECS[backend].precisions
    return "bf16" if prefers_bf16 and "bf16" in offered and backend not in ON_CPU else offered[0]


def exceeding_graphs(manifest: Manifest) -> frozenset[GraphName]:
    """The graphs that leave the range of FP16: the UNet's where it was exported in BF16 and not in FP16."""
    dtypes = manifest.graphs["denoise"].onnx
    unet = STEPS if "bf16" in dtypes and "fp16" not in dtypes else ()
    return frozenset((*unet, *(name for name, graph in manifest.graphs.items() if graph.exceeds_fp16)))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engines of a backend are compiled.

    Attributes:
        precision: what they compute in. None: the best for the backend and the model.
        optimization_level: how long TensorRT searches for fast kernels, 0 to 5. None: `OPTIMIZATION_LEVEL`.
        force: whether to compile again what is there already.
    """

    precision: Precision | None = None
    optimization_level: int | None = None
    _: KW_ONLY
    force: bool = False


def compile_backend(
    manifest: Manifest,
    bundle: Path,
    backend: str,
    options: EngineOptions = EngineOptions(),
    *,
    progress: Progress,
) -> Build:
    """Compile the engines of `backend` for the bundle in folder `bundle`, except those that an earlier build left.

    Raises:
        EngineError: the backend is not installed, does not compile on this machine, or the graphs it needs are missing.
    """
    compiler = _EngineCompiler(manifest, bundle, backend, options, progress)
    graphs = manifest.graph_names
    precisions = engine_precisions(backend, options.precision, exceeding=exceeding_graphs(manifest), graphs=graphs)
    engines = {name: compiler.engine(name, precisions[name]) for name in graphs}
    earlier = manifest.builds.get(backend)
    if earlier and _unverified(earlier.engines) == _unverified(engines):
        return earlier.model_copy(update={"version": compiler.version})  # with the results of its verification
    return Build(version=compiler.version, gpu=compiler.gpu, engines=engines)


def _optimization_level(backend: str, options: EngineOptions) -> int | None:
    """None for TensorRT for RTX too: it chooses kernels on the GPU that runs them."""
    if backend != "tensorrt":
        return None
    return OPTIMIZATION_LEVEL if options.optimization_level is None else options.optimization_level


def _unverified(engines: Mapping[GraphName, Compiled]) -> dict[GraphName, Compiled]:
    return {name: engine.model_copy(update={"difference": None}) for name, engine in engines.items()}


class _EngineCompiler:
    """Compiles the engines of one backend for one bundle."""

    def __init__(
        self, manifest: Manifest, bundle: Path, backend: str, options: EngineOptions, progress: Progress
    ) -> None:
        self.version = installed(backend)
        self.gpu: Gpu | None = gpu_here() if backend == "tensorrt" else None
        self._manifest = manifest
        self._bundle = bundle
        self._backend = backend
        self._force = options.force
        self._asked = f" --precision {options.precision}" if options.precision else ""
        self._level = _optimization_level(backend, options)
        self._folder = bundle / "engines" / backend
        self._progress = progress

    def engine(self, name: GraphName, precision: Precision) -> Compiled:
        """The engine of one graph: cached, made by the backend's maker, or the graph itself where it has none."""
        onnx = self._onnx(name, precision)
        key = self._key(name, precision, onnx)
        if (make := self._maker(precision)) is None:
            return Compiled(files=onnx.files, precision=precision, key=key, seconds=0, memory=0)
        record_file = self._folder / f"{name}.json"
        if not self._force and (cached := _cached(record_file, key, self._bundle)):
            self._progress.note(f"{name} of {self._backend}: unchanged")
            return cached
        self._folder.mkdir(parents=True, exist_ok=True)
        compiled = make(name, precision, onnx, key=key)
        write_atomically(record_file, compiled.model_dump_json(indent=2).encode())
        return compiled

    def _maker(self, precision: Precision) -> _Maker | None:
        if self._backend in TENSORRT:
            return self._tensorrt_in_eight_bits if precision in EIGHT_BITS else self._tensorrt
        if precision == "int8":
            return self._quantized
        return self._rewritten if self._backend == ONNXRUNTIME_CUDA else None

    def _tensorrt_in_eight_bits(self, name: GraphName, precision: EightBits, onnx: Onnx, *, key: str) -> Compiled:
        graphs = QuantizedGraphs(self._manifest, self._bundle, lambda: self._recordings, self._progress)
        made_from = quantized_key(self._manifest, onnx, precision, modelopt=modelopt_version())
        graph = graphs.graph(name, precision, key=made_from)
        compiled = self._tensorrt(name, precision, graph, key=key)
        return compiled.model_copy(update={"quantization": graph.difference})

    def _onnx(self, name: GraphName, precision: Precision) -> Onnx:
        dtype, exported = _graph_dtype(self._backend, precision), self._manifest.graphs[name].onnx
        if dtype not in exported:
            raise EngineError(
                f"{self._bundle} holds {name} in {', '.join(exported)}, not in {dtype}: export it once more with "
                f"build_engines.py export --backend {self._backend}{self._asked}."
            )
        return exported[dtype]

    def _key(self, name: GraphName, precision: Precision, onnx: Onnx) -> str:
        return engine_key(
            self._manifest,
            name,
            onnx,
            backend=self._backend,
            version=self.version,
            gpu=self.gpu,
            precision=precision,
            optimization_level=self._level,
        )

    def _shapes(self, name: GraphName) -> tuple[Shapes, ...]:
        return shapes(self._manifest, name) if self._backend in TENSORRT else ()

    def _tensorrt(self, name: GraphName, precision: Precision, onnx: Onnx, *, key: str) -> Compiled:
        engine, profiles = self._folder / f"{name}.engine", self._shapes(name)
        inputs = self._manifest.graphs[name].inputs
        with self._progress.stage(f"compiling {name} for {self._backend}"):
            report = build_engine(
                self._backend,
                self._bundle / onnx.files[0].path,
                engine,
                [{spec.name: profile.of(spec) for spec in inputs} for profile in profiles],
                optimization_level=self._level,
                progress=self._progress,
            )
        return Compiled(
            files=(File.of(engine, root=self._bundle),),
            precision=precision,
            profiles=_with_activations(profiles, report.activations),
            layers=FusionReport.model_validate(report.layers) if report.layers else None,
            key=key,
            seconds=round(report.seconds, 1),
            memory=report.memory,
            optimization_level=self._level,
            reused_timings=report.reused_timings,
        )

    def _rewritten(self, name: GraphName, precision: Precision, onnx: Onnx, *, key: str) -> Compiled:
        began = time.monotonic()
        with self._progress.stage(f"compiling {name} for {self._backend}"):
            make_graph = _graph_maker()
            path, layers = make_graph(name, self._manifest, self._bundle / onnx.files[0].path)
        return Compiled(
            files=(File.of(path, root=self._bundle), *onnx.files[1:]),
            precision=precision,
            layers=layers,
            key=key,
            seconds=round(time.monotonic() - began, 1),
            memory=0,
        )

    @cached_property
    def _recordings(self) -> dict[GraphName, list[dict[str, Array]]]:
        """The calibration data of FP8 and INT8, which takes minutes to compute and serves all graphs."""
        return record(self._manifest, self._bundle, self._progress)

    def _quantized(self, name: GraphName, precision: Precision, onnx: Onnx, *, key: str) -> Compiled:
        from engines.build.quantize import compress, quantize  # noqa: PLC0415 - takes seconds to import

        graph = self._bundle / onnx.files[0].path
        recording = self._recordings[name] if name in CALIBRATED else None
        began = time.monotonic()
        with self._progress.stage(f"quantizing {name}"):
            paths = quantize(graph, self._folder, recording) if recording else compress(graph, self._folder)
        return Compiled(
            files=tuple(File.of(path, root=self._bundle) for path in paths),
            precision=precision,
            key=key,
            seconds=round(time.monotonic() - began, 1),
            memory=0,
        )


def _graph_maker() -> Callable[[GraphName, Manifest, Path], tuple[Path, FusionReport]]:
    """The function that makes graphs for ONNX Runtime's CUDA provider. Raises EngineError without its packages."""
    try:
        from engines.build.onnxruntime_cuda.make import make_graph  # noqa: PLC0415 - onnx is optional
    except ImportError as error:
        raise EngineError(
            f"Compiling for {ONNXRUNTIME_CUDA} needs the package {error.name}: "
            f"{install_command(SPECS[ONNXRUNTIME_CUDA].extra)}"
        ) from error
    return make_graph


def _with_activations(profiles: Sequence[Shapes], activations: Sequence[int] | None) -> tuple[Profile, ...]:
    """The profiles, each with the bytes of device memory that its activations take, where that is known."""
    sizes: Sequence[int | None] = activations or [None] * len(profiles)
    return tuple(
        one.profile.model_copy(update={"activations": size}) for one, size in zip(profiles, sizes, strict=True)
    )


def _cached(record_file: Path, key: str, bundle: Path) -> Compiled | None:
    """The engine of an earlier build, if it has the same key and its files are unchanged."""
    try:
        compiled = Compiled.model_validate_json(record_file.read_bytes())
    except (OSError, ValidationError):
        return None
    return compiled if compiled.key == key and are_intact(bundle, compiled.files) else None
