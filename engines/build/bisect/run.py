"""Bisects the engines of a backend: from the inputs that an engine strays on to the first tensor that differs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from engines.accuracy import AccuracyError, tolerance, worst_difference
from engines.backends.registry import TENSORRT, open_device
from engines.build.bisect.finding import Finding
from engines.build.bisect.graph import Graph, matched
from engines.build.bisect.locate import Case, locate
from engines.build.bisect.measure import Compile, MarkedEngine
from engines.build.profiles import shapes
from engines.build.qdq.quantize import EIGHT_BITS
from engines.build.trajectory import GraphRunner, Trajectory
from engines.build.trt.disk import remove
from engines.build.trt.messages import Ranges
from engines.build.trt.parent import build_engine
from engines.build.verify import STEPS_COMPARED, expected
from engines.contract import Array, Arrays, GraphName, plain
from engines.errors import EngineError
from engines.manifest import Compiled, Manifest
from engines.progress import Progress


def bisect(manifest: Manifest, bundle: Path, backend: str, *, progress: Progress) -> Iterator[Finding]:
    """For each graph of `backend` whose engine strays from FP32 by more than its precision explains, where it begins.

    Raises:
        EngineError: the backend does not run on this machine, or an engine's graph cannot be marked.
    """
    build = manifest.builds[backend]
    for name, case, inputs in _failing(manifest, bundle, backend, progress):
        with progress.stage(f"bisecting {name} of {backend}"):
            yield _Bisection(manifest, bundle, backend, name, build.engines[name]).find(case, inputs, progress)


def _failing(manifest: Manifest, bundle: Path, backend: str, progress: Progress) -> list[tuple[GraphName, str, Arrays]]:
    """The graphs whose engines stray, each with the smallest inputs on which it does."""
    build = manifest.builds[backend]
    trajectory = Trajectory(manifest, bundle, steps=STEPS_COMPARED)
    _, cases = expected(manifest, bundle, build, trajectory, progress)
    files = {name: bundle / engine.files[0].path for name, engine in build.engines.items()}
    runner, failing = GraphRunner(manifest, open_device(backend), files), list[tuple[GraphName, str, Arrays]]()
    for name, engine in build.engines.items():
        allowed = tolerance(engine.precision, manifest.graphs[name].outputs)
        with progress.stage(f"verifying {name} of {backend}"):
            strays = [
                (_label(name, engine, number), inputs)
                for number, (inputs, outputs) in enumerate(cases[name])
                if not _agrees(runner(name, inputs), outputs, allowed)
            ]
        if strays:
            case, inputs = min(strays, key=lambda one: sum(array.nbytes for array in one[1].values()))
            failing.append((name, case, inputs))
    return failing


def _agrees(outputs: Arrays, wanted: Arrays, allowed: float) -> bool:
    try:
        return worst_difference(outputs, wanted).largest <= allowed
    except AccuracyError:
        return False


def _label(name: GraphName, engine: Compiled, number: int) -> str:
    """What `expected` lists: a batch of noise for each profile, or one of any shape, then the trajectory's calls."""
    noises = 0 if plain(name) == "encode_prompt" else max(len(engine.profiles), 1)
    if number >= noises:
        return f"call {number - noises + 1} of the trajectory"
    return f"noise, {engine.profiles[number].batch} at once" if engine.profiles else "noise"


def sources(manifest: Manifest, backend: str, name: GraphName, engine: Compiled) -> tuple[str, str]:
    """The ONNX graph that `engine` computes, and the exported one that was made from, relative to the bundle.

    Raises:
        EngineError: it computes no ONNX graph.
    """
    onnx = manifest.graphs[name].onnx
    plain = onnx.get("fp16", onnx["fp32"]) if backend in TENSORRT else onnx["fp32"]
    exported = next((one for dtype, one in onnx.items() if dtype == engine.precision), plain).files[0].path
    if backend not in TENSORRT:
        source = engine.files[0].path
    elif engine.precision in EIGHT_BITS:
        source = str(PurePosixPath(exported).with_name(f"{name}.{engine.precision}.onnx"))
    else:
        source = exported
    if not source.endswith(".onnx"):
        raise EngineError(
            f"{source} is no ONNX graph, whose tensors could be marked: bisect {name} in another --precision."
        )
    return source, exported


class _Bisection:
    """The bisection of one engine."""

    def __init__(self, manifest: Manifest, bundle: Path, backend: str, name: GraphName, engine: Compiled) -> None:
        self._manifest = manifest
        self._bundle = bundle
        self._backend = backend
        self._name = name
        self._engine = engine
        source, exported = sources(manifest, backend, name, engine)
        self._graph = Graph(bundle / source)
        self._reference = Graph(bundle / manifest.graphs[name].onnx["fp32"].files[0].path)
        self._counterparts = matched(self._graph, Graph(bundle / exported), self._reference)

    def find(self, case: str, inputs: Arrays, progress: Progress) -> Finding:
        outputs = self._manifest.graphs[self._name].outputs
        precision = self._engine.precision
        with self._compiler(inputs, progress) as compile:
            engine = MarkedEngine(
                self._graph,
                self._reference,
                self._counterparts,
                device=open_device(self._backend),
                compile=compile,
                inputs=inputs,
                tolerance=tolerance(precision, ()),
                tolerance_of_outputs=tolerance(precision, outputs),
            )
            return locate(engine, self._graph, self._counterparts, Case(self._name, self._backend, precision, case))

    @contextmanager
    def _compiler(self, inputs: Arrays, progress: Progress) -> Iterator[Compile]:
        """Compiles marked graphs as the engine was: with its profile, and with its level."""
        if self._backend not in TENSORRT:
            yield lambda path: path
            return
        out = self._bundle / "engines" / self._backend / f".{self._name}.bisect.{os.getpid()}.engine"
        ranges, level = self._ranges(inputs), self._engine.optimization_level

        def compile(path: Path) -> Path:
            build_engine(self._backend, path, out, [ranges], optimization_level=level, progress=progress)
            return out

        try:
            yield compile
        finally:
            remove(out)

    def _ranges(self, inputs: Arrays) -> Ranges:
        """The first profile that takes `inputs`."""
        specs = self._manifest.graphs[self._name].inputs
        profiles = [{spec.name: profile.of(spec) for spec in specs} for profile in shapes(self._manifest, self._name)]
        return next(profile for profile in profiles if _takes(profile, inputs))


def _takes(profile: Ranges, inputs: Arrays) -> bool:
    return all(_between(*profile[name][::2], array) for name, array in inputs.items())


def _between(least: Sequence[int], most: Sequence[int], array: Array) -> bool:
    return all(low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True))
