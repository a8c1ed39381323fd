"""The build as a Python API: a Stable Diffusion checkpoint becomes a bundle of ONNX graphs and compiled engines.

    from pathlib import Path

    from engines.build import api

    manifest = api.build(
        api.CheckpointSource("OFA-Sys/small-stable-diffusion-v0"),
        Path("bundles/small-sd"),
        backends=["onnxruntime"],
        options=api.ExportOptions(rows=(2, 4)),
    )
    print(manifest.builds["onnxruntime"].verification)

`build` is `export` followed by `compile`. The two may run on different machines: exporting needs torch and no GPU,
compiling needs no torch, and for TensorRT it needs the GPU. `build_engines.py` is the command line of these functions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from engines.backends.available import check_fits, unavailable_reason
from engines.backends.registry import ON_CPU, install_command
from engines.build import verify as verification
from engines.build.bisect.finding import Finding
from engines.build.bundle import (
    BundleSpec,
    geometry_of,
    graphs_of,
    load_intact,
    stored_weights,
    updated,
    with_shapes,
)
from engines.build.bundle import export as export_bundle
from engines.build.checks import (
    AUTO,
    check_compilers,
    check_export,
    check_lora_pool,
    check_options,
    check_shapes,
    resolved_backends,
)
from engines.build.compile import (
    EngineOptions,
    check_precision,
    compile_backend,
    engine_precisions,
    exceeding_graphs,
    required_dtypes,
)
from engines.build.options import (
    DEFAULT_ROWS,
    OWN,
    BackendPlan,
    CheckpointSource,
    ExportOptions,
    Reporter,
    ShapeOptions,
)
from engines.build.outline import compile_stages, export_stages
from engines.build.request_defaults.choice import notes_on_defaults
from engines.build.request_defaults.presets import PRESETS
from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.checkpoint import Checkpoint, count_parameters
from engines.checkpoints.find import find_checkpoint
from engines.contract import PIXEL_GRAPHS, GraphName
from engines.errors import EngineError
from engines.manifest import Geometry, LoraCapacity, Manifest, Precision, Size
from engines.progress import Progress

__all__ = [
    "AUTO",
    "DEFAULT_ROWS",
    "OWN",
    "PRESETS",
    "BackendPlan",
    "CheckpointSource",
    "Embedding",
    "ExportOptions",
    "Finding",
    "Lora",
    "LoraCapacity",
    "Reporter",
    "ShapeOptions",
    "Size",
    "bisect",
    "build",
    "compile",
    "export",
    "inspect",
    "verify",
]


_SILENT = Reporter()


def build(  # noqa: PLR0913 - the options of a build, by keyword
    source: CheckpointSource,
    out: Path,
    *,
    backends: Sequence[str] = (AUTO,),
    precision: Precision | None = None,
    optimization_level: int | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    verify: bool = True,
    force: bool = False,
    reporter: Reporter = _SILENT,
) -> Manifest:
    """Export a checkpoint to the bundle in folder `out`, and compile its engines.

    What an earlier build left is reused where nothing that decides it has changed. The manifest is saved after the
    export and after each backend, so a build that is interrupted keeps what it has finished.

    Args:
        source: the checkpoint.
        out: the bundle's folder; created if it does not exist.
        backends: the backends to compile for, each a name or `AUTO`.
        precision: what the engines compute in. None: FP16 on GPUs (BF16 for models that leave its range), FP32 on CPUs.
        optimization_level: how long TensorRT searches for fast kernels, 0 to 5. None: 3, TensorRT's own default.
        options: shapes, request defaults and storage of the bundle.
        verify: whether to compare the engines with the FP32 graphs, where the backend runs on this machine.
        force: whether to export and compile again what is there already.
        reporter: receives progress and results.

    Returns:
        The saved manifest.

    Raises:
        EngineError: the checkpoint is not one that can be built, a size does not fit it, a backend is unavailable or
            does not compute in `precision`, or engines differ from the graphs by more than their precision explains.
    """
    names = resolved_backends(backends, reporter.progress)
    check_compilers(names, precision, optimization_level)
    checkpoint = _find(source, out, options, reporter.progress)
    spec = _spec(checkpoint, out, names, precision, options)
    geometry, graphs = geometry_of(checkpoint, options), graphs_of(checkpoint, options)
    precisions = _precisions(names, precision, graphs, exceeding=checkpoint.exceeding_fp16)
    _note_vae(precisions, checkpoint.exceeding_fp16, reporter.progress)
    plans = _plans(precisions, geometry, count_parameters(checkpoint))
    _announce(
        plans, reporter, before=export_stages(checkpoint, graphs, spec.dtypes, geometry.resolutions[0]), verify=verify
    )
    manifest = export_bundle(checkpoint, out, spec, force=force, progress=reporter.progress)
    check_lora_pool(manifest, names)
    engines = EngineOptions(precision, optimization_level, force=force)
    compiler = _BundleCompiler(out, engines, verify=verify, reporter=reporter)
    manifest = compiler.run(manifest, names)
    reporter.on_not_followed(checkpoint.not_followed)
    return manifest


def export(  # noqa: PLR0913 - the options of an export, by keyword
    source: CheckpointSource,
    out: Path,
    *,
    backends: Sequence[str] = ("tensorrt",),
    precision: Precision | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    force: bool = False,
    reporter: Reporter = _SILENT,
) -> Manifest:
    """Export a checkpoint to ONNX graphs in folder `out`, for engines that are compiled later or elsewhere.

    Args:
        source: the checkpoint.
        out: the bundle's folder; created if it does not exist.
        backends: the names of the backends that the graphs are for.
        precision: what the engines will compute in; None as in `build`.
        options: shapes, request defaults and storage of the bundle.
        force: whether to export again what is there already.
        reporter: receives progress.

    Returns:
        The saved manifest.

    Raises:
        EngineError: torch is not installed, the checkpoint is not one that can be built, a size does not fit it, or a
            backend does not compute in `precision`.
    """
    names = resolved_backends(backends, reporter.progress)
    for backend in names:
        check_precision(backend, precision)
    checkpoint = _find(source, out, options, reporter.progress)
    spec = _spec(checkpoint, out, names, precision, options)
    size = geometry_of(checkpoint, options).resolutions[0]
    _announce((), reporter, before=export_stages(checkpoint, graphs_of(checkpoint, options), spec.dtypes, size))
    manifest = export_bundle(checkpoint, out, spec, force=force, progress=reporter.progress)
    reporter.on_not_followed(checkpoint.not_followed)
    return manifest


def compile(  # noqa: PLR0913 - the options of a compilation, by keyword
    bundle: Path,
    *,
    backends: Sequence[str] = (AUTO,),
    precision: Precision | None = None,
    optimization_level: int | None = None,
    shapes: ShapeOptions = ShapeOptions(),  # noqa: B008 - frozen
    verify: bool = True,
    force: bool = False,
    reporter: Reporter = _SILENT,
) -> Manifest:
    """Compile engines from the graphs of an exported bundle; needs no torch.

    Engines of other backends are dropped from the manifest where `shapes` require other profiles than they have.

    Args:
        bundle: the bundle's folder.
        backends: the backends to compile for, each a name or `AUTO`.
        precision: what the engines compute in; None as in `build`.
        optimization_level: as in `build`.
        shapes: resolutions, row buckets, decode batch and LoRAs on the device, where they shall differ from the
            bundle's.
        verify: whether to compare the engines with the FP32 graphs, where the backend runs on this machine.
        force: whether to compile again what is there already.
        reporter: receives progress and results.

    Returns:
        The saved manifest.

    Raises:
        BundleError: there is no bundle, or its graphs are missing or altered.
        EngineError: as in `build`.
    """
    names = resolved_backends(backends, reporter.progress)
    check_compilers(names, precision, optimization_level)
    manifest = with_shapes(load_intact(bundle), shapes)
    check_shapes(manifest)
    check_lora_pool(manifest, names)
    precisions = _precisions(names, precision, manifest.graph_names, exceeding=exceeding_graphs(manifest))
    _note_vae(precisions, exceeding_graphs(manifest), reporter.progress)
    plans = _plans(precisions, manifest, manifest.parameters)
    _announce(plans, reporter, before=(), verify=verify)
    options = EngineOptions(precision, optimization_level, force=force)
    compiler = _BundleCompiler(bundle, options, verify=verify, reporter=reporter)
    return compiler.run(manifest, names)


def verify(bundle: Path, *, backends: Sequence[str] = (), reporter: Reporter = _SILENT) -> Manifest:
    """Compare the engines of a bundle with its FP32 graphs, and save the differences in the manifest.

    A backend whose engines differ by more than their precision explains is dropped from the manifest.

    Args:
        bundle: the bundle's folder.
        backends: names of backends; empty: all of the bundle that run on this machine.
        reporter: receives progress and results.

    Returns:
        The saved manifest.

    Raises:
        BundleError: there is no bundle, or a file of it is missing or altered.
        EngineError: a backend in `backends` has no engines or does not run on this machine, or its engines differ.
    """
    manifest = inspect(bundle)
    for backend in backends or manifest.builds:
        _check_comparable(manifest, bundle, backend, required=bool(backends))
        manifest = _verified(manifest, bundle, backend, reporter.progress)
        reporter.on_built(manifest, backend)
    return manifest


def bisect(bundle: Path, *, backends: Sequence[str] = (), reporter: Reporter = _SILENT) -> list[Finding]:
    """Find where engines stray from the FP32 graphs: the first layer that differs, in each graph that does.

    The bundle stays as it is. Engines are compiled and run several times, with some tensors marked as outputs.

    Args:
        bundle: the bundle's folder.
        backends: names of backends; empty: all of the bundle that run on this machine.
        reporter: receives progress.

    Raises:
        BundleError: there is no bundle, or a file of it is missing or altered.
        EngineError: a backend in `backends` has no engines or does not run on this machine, or Polygraphy is missing.
    """
    try:
        from engines.build.bisect.run import bisect as find  # noqa: PLC0415 - a package that is needed for this alone
    except ImportError as error:
        raise EngineError(f"--bisect needs the package {error.name}: {install_command('bisect')}") from error
    manifest, found = inspect(bundle), list[Finding]()
    for backend in backends or manifest.builds:
        _check_comparable(manifest, bundle, backend, required=bool(backends))
        if reason := unavailable_reason(backend):
            reporter.progress.note(f"{backend}: not bisected, since it cannot run here ({reason})")
            continue
        check_fits(manifest, backend, bundle)
        found += find(manifest, bundle, backend, progress=reporter.progress)
    return found


def inspect(bundle: Path) -> Manifest:
    """The manifest of the bundle in a folder, with all of its files verified. Raises BundleError."""
    return Manifest.load(bundle)


def _check_comparable(manifest: Manifest, bundle: Path, backend: str, *, required: bool) -> None:
    """Raise EngineError unless there are engines of `backend`, and they run here if that is `required`."""
    if backend not in manifest.builds:
        raise EngineError(
            f"{bundle} holds no engines for {backend}: compile them first (with --no-verify if verification fails)."
        )
    if required and (reason := unavailable_reason(backend)):
        raise EngineError(f"{backend} cannot be verified here: {reason}.")


class _BundleCompiler:
    """Compiles, verifies and saves the engines of a bundle, one backend after the other."""

    def __init__(self, bundle: Path, options: EngineOptions, *, verify: bool, reporter: Reporter) -> None:
        self._bundle = bundle
        self._options = options
        self._verify = verify
        self._reporter = reporter

    def run(self, manifest: Manifest, backends: Sequence[str]) -> Manifest:
        for backend in backends:
            manifest = self._compiled(manifest, backend)
            self._reporter.on_built(manifest, backend)
        return manifest

    def _compiled(self, manifest: Manifest, backend: str) -> Manifest:
        progress = self._reporter.progress
        build = compile_backend(manifest, self._bundle, backend, self._options, progress=progress)
        manifest = updated(manifest, builds={**manifest.builds, backend: build})
        manifest.save(self._bundle)
        if self._verify and not build.verification:
            return _verified(manifest, self._bundle, backend, progress)
        return manifest


def _verified(manifest: Manifest, bundle: Path, backend: str, progress: Progress) -> Manifest:
    """The manifest with the results of verifying one backend, saved; as it was where the backend cannot run here."""
    if reason := unavailable_reason(backend):
        progress.note(f"{backend}: not yet verified, since it cannot run here ({reason})")
        return manifest
    check_fits(manifest, backend, bundle)
    try:
        build = verification.verify(manifest, bundle, backend, progress=progress)
    except verification.VerificationError:
        others = {name: build for name, build in manifest.builds.items() if name != backend}
        updated(manifest, builds=others).save(bundle)  # engines that are known to be wrong shall not be served
        raise
    manifest = updated(manifest, builds={**manifest.builds, backend: build})
    manifest.save(bundle)
    return manifest


_Precisions = Mapping[str, Mapping[GraphName, Precision]]  # by backend


def _precisions(
    names: Sequence[str],
    precision: Precision | None,
    graphs: Sequence[GraphName],
    *,
    exceeding: Collection[GraphName],
) -> _Precisions:
    return {name: engine_precisions(name, precision, exceeding=exceeding, graphs=graphs) for name in names}


def _note_vae(precisions: _Precisions, exceeding: Collection[GraphName], progress: Progress) -> None:
    """Tell where graphs of the VAE compute in another type than FP16, which the others compute in."""
    for backend, chosen in precisions.items():
        if names := [name for name in PIXEL_GRAPHS if name in exceeding and "fp16" in chosen.values()]:
            progress.note(
                f"{' and '.join(names)} of {backend}: in {chosen[names[0]]}, since this VAE leaves FP16's range "
                "(force_upcast in its config.json, or measured)"
            )


def _plans(precisions: _Precisions, geometry: Geometry, parameters: Mapping[GraphName, int]) -> list[BackendPlan]:
    return [BackendPlan(backend, geometry, graphs, parameters) for backend, graphs in precisions.items()]


def _announce(plans: Sequence[BackendPlan], reporter: Reporter, *, before: Iterable[str], verify: bool = False) -> None:
    """Report the plans, and the names of all stages: those `before` compiling, and of each backend."""
    stages = list(before)
    for plan in plans:
        reporter.on_plan(plan)
        verifies = verify and unavailable_reason(plan.backend) is None
        stages += compile_stages(plan.backend, plan.precisions, verify=verifies)
    reporter.progress.expect(stages)


def _find(source: CheckpointSource, out: Path, options: ExportOptions, progress: Progress) -> Checkpoint:
    check_export(source.model, out)
    checkpoint = find_checkpoint(
        source.model,
        revision=source.revision,
        config=source.config,
        allow_pickle=source.allow_pickle,
        loras=source.loras,
        embeddings=source.embeddings,
        decoder=source.decoder,
        vae=source.vae,
        variant=source.variant,
        with_safety_checker=source.safety_checker,
        check=lambda checkpoint: check_options(checkpoint, options),
        progress=progress,
    )
    for note in notes_on_defaults(checkpoint, options):
        progress.note(note)
    return checkpoint


def _spec(
    checkpoint: Checkpoint, out: Path, backends: Sequence[str], precision: Precision | None, options: ExportOptions
) -> BundleSpec:
    """The options with what the backends require. Raises EngineError where one does not compute in `precision`."""
    graphs, exceeding = graphs_of(checkpoint, options), checkpoint.exceeding_fp16
    dtypes = [required_dtypes(backend, precision, exceeding=exceeding, graphs=graphs) for backend in backends]
    gpus_alone = not set(backends) & set(ON_CPU) and precision != "fp32"
    weights = options.weights or stored_weights(out) or ("fp16" if gpus_alone else "fp32")
    return BundleSpec(options=options, weights=weights, dtypes=frozenset().union(*dtypes))
