"""Exports to bundles: graphs that are missing or out of date are exported, and the manifest is written last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.backends.registry import install_command
from engines.build.keys import export_key
from engines.build.options import ExportOptions, ShapeOptions
from engines.build.profiles import shapes as profiles_of
from engines.build.request_defaults.choice import request_defaults
from engines.checkpoints.checkpoint import LARGE_PART, Checkpoint, count_parameters
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.contract import LORA_GRAPHS, GraphName
from engines.errors import EngineError
from engines.held import are_intact
from engines.manifest import (
    Build,
    BundleError,
    ComputeDtype,
    Defaults,
    Geometry,
    Graph,
    LoraCapacity,
    LoraLayer,
    Manifest,
    Size,
    Storage,
)
from engines.progress import Progress

if TYPE_CHECKING:
    from engines.checkpoints.loading.modules import Modules

Preview = tuple[tuple[float, ...], ...]  # an affine map from latents to RGB, as in the manifest
_EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
_MEMORY_PER_WEIGHT = 12  # bytes at the peak, of a part that is read into memory
_MEMORY = 3e9  # bytes: torch, and what large parts take, whose weights stay in their files


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSpec:
    """The export options of a bundle, and what its backends require of the graphs."""

    options: ExportOptions
    weights: Storage
    dtypes: frozenset[tuple[GraphName, ComputeDtype]] = frozenset()  # of graphs that are exported in addition to FP32


def export(checkpoint: Checkpoint, out: Path, spec: BundleSpec, *, force: bool = False, progress: Progress) -> Manifest:
    """Export the graphs of `checkpoint` to folder `out` and write its manifest; needs torch unless they are there.

    Raises:
        EngineError: a size does not fit the model, the weights cannot be read, or a graph differs from torch.
    """
    key = _export_key(checkpoint, spec.weights)
    earlier = None if force else _earlier_export(out, key)
    if earlier and _has_graphs(earlier, spec):
        progress.note("the graphs: unchanged")
    else:
        earlier = _Exporter(checkpoint, out, spec, key=key, earlier=earlier, progress=progress).run()
    manifest = _with_options(earlier, checkpoint, spec.options)
    manifest.save(out)
    return manifest


def geometry_of(checkpoint: Checkpoint, options: ExportOptions) -> Geometry:
    """The input sizes of the bundle that an export makes. Raises EngineError where one does not fit the model."""
    config = checkpoint.config
    for size in options.resolutions:
        _check_size(size, config.latent.multiple)
    return Geometry(
        resolutions=options.resolutions or (config.size,),
        rows=options.rows,
        decode_batch=options.decode_batch,
        latent=config.latent,
        context=config.context,
        lora=options.lora,
    )


def graphs_of(checkpoint: Checkpoint, options: ExportOptions) -> tuple[GraphName, ...]:
    """The graphs that the checkpoint is exported to."""
    return (*checkpoint.graphs, *LORA_GRAPHS.values()) if options.lora else checkpoint.graphs


def stored_weights(bundle: Path) -> Storage | None:
    """How an existing bundle stores its weights; None where there is no bundle."""
    with suppress(BundleError):
        return Manifest.read(bundle).weights
    return None


def updated(manifest: Manifest, **fields: Any) -> Manifest:
    """A copy of `manifest` with other values of `fields`, without builds whose profiles no longer cover its shapes.

    Raises:
        EngineError: a size does not fit the model.
    """
    for size in fields.get("resolutions", ()):
        _check_size(size, manifest.latent.multiple)
    changed = Manifest.model_validate({**dict(manifest), **fields})
    builds = {backend: build for backend, build in changed.builds.items() if _covers(build, changed, before=manifest)}
    return Manifest.model_validate({**dict(changed), "builds": builds})


def with_shapes(manifest: Manifest, shapes: ShapeOptions) -> Manifest:
    """`manifest` with the given shapes, as `updated`. Raises EngineError, also where it cannot have LoRAs."""
    changes = {"resolutions": shapes.resolutions, "rows": shapes.rows, "decode_batch": shapes.decode_batch}
    lora = _lora_capacity(manifest, shapes)
    return updated(manifest, lora=lora, **{name: value for name, value in changes.items() if value})


def _lora_capacity(manifest: Manifest, shapes: ShapeOptions) -> LoraCapacity | None:
    """What the device shall hold of LoRAs. Raises EngineError if the bundle has no graphs that apply them."""
    if shapes.lora_slots is None and shapes.lora_rank is None:
        return manifest.lora
    if manifest.lora is None:
        raise EngineError(
            f"{manifest.name} has no graphs that apply LoRAs: export it once more with build_engines.py export "
            "--lora-slots N."
        )
    return LoraCapacity(
        slots=shapes.lora_slots or manifest.lora.slots,
        rank=shapes.lora_rank or manifest.lora.rank,
    )


def load_intact(bundle: Path) -> Manifest:
    """The manifest of a bundle, without builds of which an engine file is missing or altered.

    Raises:
        BundleError: a graph is missing or altered; it has to be exported again.
    """
    manifest = Manifest.read(bundle)
    manifest.model_copy(update={"builds": {}}).verify(bundle)
    intact = {backend: build for backend, build in manifest.builds.items() if _is_intact(build, bundle)}
    return manifest.model_copy(update={"builds": intact})


def _check_size(size: Size, multiple: int) -> None:
    if size.width % multiple or size.height % multiple:
        raise EngineError(f"{size} does not fit this model: width and height must be multiples of {multiple}.")


def _covers(build: Build, manifest: Manifest, *, before: Geometry) -> bool:
    """Whether the profiles of all engines that have some are those that the manifest requires."""
    for name, engine in build.engines.items():
        if engine.profiles and name in LORA_GRAPHS.values() and manifest.lora != before.lora:
            return False
        if engine.profiles:
            required = [(shape.profile.size, shape.profile.batch) for shape in profiles_of(manifest, name)]
            if [(profile.size, profile.batch) for profile in engine.profiles] != required:
                return False
    return True


def _is_intact(build: Build, bundle: Path) -> bool:
    return are_intact(bundle, {file for engine in build.engines.values() for file in engine.files})


def _earlier_export(out: Path, key: str) -> Manifest | None:
    with suppress(BundleError):
        manifest = load_intact(out)
        if manifest.export_key == key:
            return manifest
    return None


def _has_graphs(manifest: Manifest, spec: BundleSpec) -> bool:
    if spec.options.lora and not manifest.lora_layers:
        return False
    wanted = [(manifest.graphs[name], dtype) for name, dtype in spec.dtypes]
    return all(graph.exported_in(dtype) in graph.onnx for graph, dtype in wanted)


def _with_options(manifest: Manifest, checkpoint: Checkpoint, options: ExportOptions) -> Manifest:
    return updated(
        manifest,
        source=checkpoint.source,  # of the same content, maybe by other names
        name=options.name or checkpoint.source.name,
        resolutions=options.resolutions or (manifest.trained_size,),
        rows=options.rows,
        decode_batch=options.decode_batch,
        lora=options.lora,
        **_without_lora_graphs(manifest) if options.lora is None else {},
        defaults=request_defaults(checkpoint, options),
        examples=options.examples,
        notes=options.notes,
    )


def _without_lora_graphs(manifest: Manifest) -> dict[str, Any]:
    """The fields of a manifest whose graphs apply no LoRAs."""
    graphs = {name: graph for name, graph in manifest.graphs.items() if name not in LORA_GRAPHS.values()}
    builds = {backend: _with_engines(build, graphs) for backend, build in manifest.builds.items()}
    return {"graphs": graphs, "builds": builds, "lora_layers": (), "lora_refused": ()}


def _with_engines(build: Build, graphs: Iterable[GraphName]) -> Build:
    return build.model_copy(update={"engines": {name: build.engines[name] for name in graphs}})


def _memory_of(checkpoint: Checkpoint) -> float:
    """An estimate of the bytes that an export takes, without pages of files, which the system can drop."""
    counts = count_parameters(checkpoint).values()
    if checkpoint.loras or checkpoint.embeddings or checkpoint.allow_pickle:
        return _MEMORY + _MEMORY_PER_WEIGHT * sum(counts)
    return _MEMORY + _MEMORY_PER_WEIGHT * sum(count for count in counts if count < LARGE_PART)


class _Exporter:
    """Exports one checkpoint, for the graphs that an earlier export of it lacks."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        spec: BundleSpec,
        *,
        key: str,
        earlier: Manifest | None,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._spec = spec
        self._key = key
        self._earlier = earlier
        self._progress = progress

    def run(self) -> Manifest:
        geometry_of(self._checkpoint, self._spec.options)  # refuses a size that does not fit before anything is loaded
        self._warn_of_memory()
        with self._progress.stage("loading torch"):
            from engines.checkpoints.loading.convert import as_folder  # noqa: PLC0415 - takes seconds, and needs torch
            from engines.checkpoints.loading.modules import load_modules  # noqa: PLC0415 - as above

        with as_folder(self._checkpoint, self._progress) as config:
            with self._progress.stage("reading the weights"):
                modules = load_modules(config, self._checkpoint)
            self._out.mkdir(parents=True, exist_ok=True)
            lora = self._lora(modules)
            graphs = self._graphs(config, modules, lora.get("lora_layers", ()))
            manifest = self._manifest(config, graphs, self._preview(config, modules))
            return Manifest.model_validate({**dict(manifest), **lora})

    def _lora(self, modules: Modules) -> dict[str, Any]:
        """The fields of the manifest that tell which layers LoRAs update, where requests may have them."""
        from engines.export.lora import other_layers  # noqa: PLC0415 - as above
        from engines.export.trace import lora_layers  # noqa: PLC0415 - as above

        if self._spec.options.lora is None:
            return {}
        return {
            "lora_layers": lora_layers(modules),
            "lora_refused": tuple(other_layers(modules.unet)),
        }

    def _warn_of_memory(self) -> None:
        """Warn before minutes of work that the system may end the process, which it does without a message."""
        needed = _memory_of(self._checkpoint)
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            self._progress.note(
                f"warning: exporting takes about {needed / 1e9:.0f} GB of memory, and this machine has "
                f"{present / 1e9:.0f} GB: the system may end it. Export on a larger machine: the bundle can be copied, "
                "and compiled here."
            )

    def _graphs(
        self, config: CheckpointConfig, modules: Modules, layers: Sequence[LoraLayer]
    ) -> dict[GraphName, Graph]:
        from engines.export.run import export_graphs  # noqa: PLC0415 - as above

        return export_graphs(
            config,
            modules,
            self._out,
            storage=self._spec.weights,
            typed=sorted(self._spec.dtypes),
            size=self._size(config),
            known=dict(self._earlier.graphs) if self._earlier else {},
            exceeding=self._checkpoint.exceeding_fp16,
            layers=layers,
            progress=self._progress,
        )

    def _preview(self, config: CheckpointConfig, modules: Modules) -> Preview:
        from engines.export.preview import fit_rgb  # noqa: PLC0415 - as above

        with self._progress.stage("fitting previews"):
            return fit_rgb(modules.vae, config.latent)

    def _size(self, config: CheckpointConfig) -> Size:
        return (*self._spec.options.resolutions, config.size)[0]

    def _manifest(self, config: CheckpointConfig, graphs: dict[GraphName, Graph], preview: Preview) -> Manifest:
        """The manifest before the options, but for the shapes."""
        from engines.export.run import export_tokenizer  # noqa: PLC0415 - as above

        return Manifest(
            name=self._checkpoint.name,
            source=self._checkpoint.source,
            weights=self._spec.weights,
            trained_size=config.size,
            preview=preview,
            resolutions=(self._size(config),),
            rows=self._spec.options.rows,
            latent=config.latent,
            context=config.context,
            tokenizer=export_tokenizer(config, self._checkpoint.learned_tokens, self._out),
            noise_schedule=config.noise_schedule,
            defaults=Defaults(scheduler=config.scheduler),
            graphs=graphs,
            builds=self._builds(graphs),
            feature_drift=self._earlier.feature_drift if self._earlier else None,
            versions=exporter_versions(),
            export_key=self._key,
        )

    def _builds(self, graphs: Mapping[GraphName, Graph]) -> dict[str, Build]:
        """Those of the earlier export that have an engine for each graph, with these engines alone."""
        earlier = self._earlier.builds if self._earlier else {}
        whole = {backend: build for backend, build in earlier.items() if graphs.keys() <= build.engines.keys()}
        return {backend: _with_engines(build, graphs) for backend, build in whole.items()}


def exporter_versions() -> dict[str, str]:
    """The versions of the packages that export. Raises EngineError, with the install command, if one is missing."""
    return {package: _version(package) for package in _EXPORTERS}


def _export_key(checkpoint: Checkpoint, weights: Storage) -> str:
    return export_key(checkpoint.source, weights, exporter_versions())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise EngineError(
            f"Exporting a checkpoint needs the package {package}: {install_command('build')}. "
            "A bundle that was exported elsewhere needs none: build_engines.py compile BUNDLE."
        ) from None
