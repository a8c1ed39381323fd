"""ONNX graphs become the engines of one backend. What is there and still right is kept. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from engines.backends.available import gpu_here, installed
from engines.backends.registry import ON_CPU, SPECS, TENSORRT
from engines.build.keys import engine_key
from engines.build.profiles import Shapes, shapes
from engines.build.trajectory import CALIBRATED, record
from engines.build.trt.parent import build_engine
from engines.contract import GRAPHS, STEPS, Array, GraphName
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import Build, Compiled, ComputeDtype, File, FusionReport, Gpu, Manifest, Onnx, Precision
from engines.progress import Progress


def check_precision(backend: str, precision: Precision | None) -> None:
    """Raise EngineError, saying what there is, unless `backend` computes in `precision`."""
    offered = SPECS[backend].precisions
    if precision and precision not in offered:
        hint = " Its weights can be stored in half the space with --weights fp16." if precision == "fp16" else ""
        raise EngineError(f"{backend} computes in {' or '.join(offered)}, not in {precision}.{hint}")


def precisions(backend: str, precision: Precision | None, *, prefers_bf16: bool) -> dict[GraphName, Precision]:
    """What each engine of `backend` will compute in. Raises EngineError where it cannot.

    INT8 is for all graphs, though in some for the weights alone. BF16 is for what takes the time, which on a CPU is the
    VAE's decoder too. The rest takes what is nearest: FP16 on GPUs, whose range it stays within and whose digits it
    keeps, FP32 on CPUs.
    """
    check_precision(backend, precision)
    chosen = precision or _default(backend, prefers_bf16=prefers_bf16)
    if chosen != "bf16":
        return dict.fromkeys(GRAPHS, chosen)
    if backend in ON_CPU:
        return {name: chosen if name in (*STEPS, "decode") else "fp32" for name in GRAPHS}
    return {name: chosen if name in STEPS else "fp16" for name in GRAPHS}


def typed_graphs(
    backend: str, precision: Precision | None, *, prefers_bf16: bool
) -> set[tuple[GraphName, ComputeDtype]]:
    """The graphs that are needed in another precision than FP32, each with that precision. Raises EngineError."""
    chosen = precisions(backend, precision, prefers_bf16=prefers_bf16)
    return {(name, typed) for name, one in chosen.items() if (typed := _typed(one)) != "fp32"}


def _typed(precision: Precision) -> ComputeDtype:
    """The precision of the ONNX graph that an engine is made of: INT8 is made of FP32."""
    return "fp32" if precision == "int8" else precision


def _default(backend: str, *, prefers_bf16: bool) -> Precision:
    """BF16 where the model asks for it, on GPUs alone: CPUs lack no range in FP32."""
    offered = SPECS[backend].precisions
    return "bf16" if prefers_bf16 and "bf16" in offered and backend not in ON_CPU else offered[0]


def prefers_bf16(manifest: Manifest) -> bool:
    """Whether the UNet was exported in BF16 for the lack of range in FP16, in which case there is no FP16."""
    typed = manifest.graphs["denoise"].onnx
    return "bf16" in typed and "fp16" not in typed


def compile_backend(
    manifest: Manifest,
    bundle: Path,
    backend: str,
    *,
    precision: Precision | None = None,
    force: bool = False,
    progress: Progress,
) -> Build:
    """The engines of `backend` for the bundle in folder `bundle`, compiled where those of an earlier build do not fit.

    Raises:
        EngineError: the backend is not installed, does not compile on this machine, or the graphs it needs are missing.
    """
    made = _Compiler(manifest, bundle, backend, progress)
    chosen = precisions(backend, precision, prefers_bf16=prefers_bf16(manifest))
    engines = {name: made.engine(name, chosen[name], force=force) for name in GRAPHS}
    earlier = manifest.builds.get(backend)
    if earlier and _unverified(earlier.engines) == _unverified(engines):
        return earlier.model_copy(update={"version": made.version})  # with what its verification found
    return Build(version=made.version, gpu=made.gpu, engines=engines)


def _unverified(engines: Mapping[GraphName, Compiled]) -> dict[GraphName, Compiled]:
    return {name: engine.model_copy(update={"difference": None}) for name, engine in engines.items()}


class _Compiler:
    """One backend's way from ONNX to engines."""

    def __init__(self, manifest: Manifest, bundle: Path, backend: str, progress: Progress) -> None:
        self.version = installed(backend)
        self.gpu: Gpu | None = gpu_here() if backend == "tensorrt" else None
        self.keys: dict[GraphName, str] = {}
        self._manifest = manifest
        self._bundle = bundle
        self._backend = backend
        self._progress = progress

    def engine(self, name: GraphName, precision: Precision, *, force: bool) -> Compiled:
        onnx = self._onnx(name, precision)
        key = self.keys[name] = engine_key(
            self._manifest,
            name,
            onnx,
            backend=self._backend,
            version=self.version,
            gpu=self.gpu,
            precision=precision,
        )
        if self._backend in TENSORRT or precision == "int8":
            record = self._bundle / "engines" / self._backend / f"{name}.json"
            kept = None if force else _recall(record, key, self._bundle)
            if kept:
                self._progress.note(f"{name} of {self._backend}: unchanged")
                return kept
            make = self._quantized if precision == "int8" else self._tensorrt
            compiled = make(name, precision, onnx)
            write_atomically(record, compiled.model_dump_json(indent=2).encode())
            return compiled
        return Compiled(files=onnx.files, precision=precision, key=key, seconds=0, memory=0)

    def _onnx(self, name: GraphName, precision: Precision) -> Onnx:
        typed = _typed(precision)
        try:
            return self._manifest.graphs[name].onnx[typed]
        except KeyError:
            have = ", ".join(self._manifest.graphs[name].onnx)
            raise EngineError(
                f"{self._bundle} holds {name} in {have}, not in {typed}: export it once more with "
                f"build_engines.py export --precision {typed}."
            ) from None

    def _shapes(self, name: GraphName) -> tuple[Shapes, ...]:
        return shapes(self._manifest, name) if self._backend in TENSORRT else ()

    def _tensorrt(self, name: GraphName, precision: Precision, onnx: Onnx) -> Compiled:
        out = self._bundle / "engines" / self._backend / f"{name}.engine"
        out.parent.mkdir(parents=True, exist_ok=True)
        profiles = self._shapes(name)
        specs = self._manifest.graphs[name].inputs
        with self._progress.stage(f"compiling {name} for {self._backend}"):
            report = build_engine(
                self._backend,
                self._bundle / onnx.files[0].path,
                out,
                [{spec.name: shape.of(spec) for spec in specs} for shape in profiles],
                progress=self._progress,
            )
        activations = report.activations or [None] * len(profiles)
        return Compiled(
            files=(File.of(out, root=self._bundle),),
            precision=precision,
            profiles=tuple(
                shape.profile.model_copy(update={"activations": size})
                for shape, size in zip(profiles, activations, strict=True)
            ),
            layers=FusionReport.model_validate(report.layers) if report.layers else None,
            key=self.keys[name],
            seconds=round(report.seconds, 1),
            memory=report.memory,
        )

    @cached_property
    def _recordings(self) -> dict[GraphName, list[dict[str, Array]]]:
        """What INT8 is calibrated on: minutes of work, for all that asks for it."""
        return record(self._manifest, self._bundle, self._progress)

    def _quantized(self, name: GraphName, precision: Precision, onnx: Onnx) -> Compiled:
        from engines.build.quantize import compress, quantize  # noqa: PLC0415 - seconds of imports, for those who ask for it

        graph, out = self._bundle / onnx.files[0].path, self._bundle / "engines" / self._backend
        out.mkdir(parents=True, exist_ok=True)
        recording = self._recordings[name] if name in CALIBRATED else None
        began = time.monotonic()
        with self._progress.stage(f"quantizing {name}"):
            paths = quantize(graph, out, recording) if recording else compress(graph, out)
        return Compiled(
            files=tuple(File.of(path, root=self._bundle) for path in paths),
            precision=precision,
            key=self.keys[name],
            seconds=round(time.monotonic() - began, 1),
            memory=0,
        )


def _recall(record: Path, key: str, bundle: Path) -> Compiled | None:
    """The engine that an earlier build left, if it was made from the same things and is still as it was."""
    try:
        compiled = Compiled.model_validate_json(record.read_bytes())
    except (OSError, ValidationError):
        return None
    whole = all(file.matches(bundle / file.path) for file in compiled.files)
    return compiled if compiled.key == key and whole else None
