"""Brings a folder to what was asked of it: exports what is missing, keeps what is right, writes the manifest last."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build.keys import export_key
from engines.build.profiles import shapes
from engines.checkpoints.checkpoint import Checkpoint, count_parameters
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import Build, BundleError, ComputeDtype, Defaults, Geometry, Manifest, Size, Storage
from engines.progress import Progress

if TYPE_CHECKING:
    from engines.checkpoints.loading.modules import Modules

_EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
_MEMORY_PER_WEIGHT = 12  # bytes at the peak


@dataclass(frozen=True, slots=True)
class BundleSpec:
    """What a bundle shall be. None and the empty leave it to the checkpoint, or to what the bundle already says."""

    weights: Storage
    typed: tuple[tuple[GraphName, ComputeDtype], ...]  # graphs, beside FP32
    rows: tuple[int, ...]
    decode_batch: int
    name: str | None = None
    resolutions: tuple[Size, ...] = ()
    steps: int | None = None
    guidance: float | None = None
    examples: tuple[str, ...] = ()


def export(
    checkpoint: Checkpoint, out: Path, wanted: BundleSpec, *, force: bool = False, progress: Progress
) -> Manifest:
    """Bring the graphs in folder `out` to those of `checkpoint`, and write the manifest. Needs torch where they differ.

    Raises:
        EngineError: a size does not fit the model, the weights cannot be read, or a graph differs from torch.
    """
    key = _export_key(checkpoint, wanted.weights)
    earlier = None if force else _earlier(out, key)
    if earlier and not _missing(earlier, wanted.typed):
        progress.note("the graphs: unchanged")
        manifest = _described(earlier, wanted)
    else:
        manifest = _exported(checkpoint, out, wanted, key=key, earlier=earlier, progress=progress)
    manifest.save(out)
    return manifest


def geometry_of(checkpoint: Checkpoint, wanted: BundleSpec) -> Geometry:
    """The sizes that an export will have. Raises EngineError where one does not fit the model."""
    config = checkpoint.config
    for size in wanted.resolutions:
        check_size(size, config.latent.multiple)
    return Geometry(
        resolutions=wanted.resolutions or (config.size,),
        rows=wanted.rows,
        decode_batch=wanted.decode_batch,
        latent=config.latent,
        context=config.context,
    )


def stored(out: Path) -> Storage | None:
    """How the bundle in folder `out` stores its weights; None where there is none."""
    with suppress(BundleError):
        return Manifest.read(out).weights
    return None


def reshaped(manifest: Manifest, **facts: Any) -> Manifest:
    """`manifest` with other facts, and without the builds that were compiled for other shapes.

    Raises:
        EngineError: a size does not fit the model.
    """
    changed = Manifest.model_validate({**dict(manifest), **facts})
    for size in changed.resolutions:
        check_size(size, changed.latent.multiple)
    kept = {backend: build for backend, build in changed.builds.items() if _covers(build, changed)}
    return Manifest.model_validate({**dict(changed), "builds": kept})


def check_size(size: Size, multiple: int) -> None:
    """Raise EngineError unless the UNet can halve `size` as often as it must."""
    if size.width % multiple or size.height % multiple:
        raise EngineError(f"{size} does not fit this model: width and height must be multiples of {multiple}.")


def _covers(build: Build, manifest: Manifest) -> bool:
    """Whether engines with profiles have those that the manifest asks for."""
    for name, engine in build.engines.items():
        if engine.profiles:
            asked = [(shape.profile.size, shape.profile.batch) for shape in shapes(manifest, name)]
            if [(profile.size, profile.batch) for profile in engine.profiles] != asked:
                return False
    return True


def with_whole_builds(bundle: Path) -> Manifest:
    """The manifest of a bundle whose graphs are as they were built, without backends of which an engine is not.

    Raises:
        BundleError: a graph is missing or altered; it has to be exported again.
    """
    manifest = Manifest.read(bundle)
    manifest.model_copy(update={"builds": {}}).verify(bundle)
    whole = {backend: build for backend, build in manifest.builds.items() if _whole(build, bundle)}
    return manifest.model_copy(update={"builds": whole})


def _whole(build: Build, bundle: Path) -> bool:
    return all(file.matches(bundle / file.path) for engine in build.engines.values() for file in engine.files)


def _earlier(out: Path, key: str) -> Manifest | None:
    with suppress(BundleError):
        manifest = with_whole_builds(out)
        if manifest.export_key == key:
            return manifest
    return None


def _missing(manifest: Manifest, typed: Sequence[tuple[GraphName, ComputeDtype]]) -> bool:
    return any(precision not in manifest.graphs[name].onnx for name, precision in typed)


def _described(manifest: Manifest, wanted: BundleSpec) -> Manifest:
    return reshaped(
        manifest,
        name=wanted.name or manifest.source.name,
        resolutions=wanted.resolutions or (manifest.trained_size,),
        rows=wanted.rows,
        decode_batch=wanted.decode_batch,
        defaults=_defaults(manifest.defaults.scheduler, wanted),
        examples=wanted.examples,
    )


def _defaults(scheduler: str, wanted: BundleSpec) -> Defaults:
    """What was asked for, or what diffusers' own pipelines take."""
    steps, guidance = (4, 8.5) if scheduler == "lcm" else (50, 7.5)
    return Defaults(
        scheduler=scheduler,
        num_inference_steps=wanted.steps or steps,
        guidance_scale=guidance if wanted.guidance is None else wanted.guidance,
    )


def _exported(
    checkpoint: Checkpoint, out: Path, wanted: BundleSpec, *, key: str, earlier: Manifest | None, progress: Progress
) -> Manifest:
    geometry_of(checkpoint, wanted)  # refuses a size that does not fit before anything is loaded
    _warn_of_memory(checkpoint, progress)
    with progress.stage("loading torch"):
        from engines.checkpoints.loading.convert import as_folder  # noqa: PLC0415 - seconds of imports, for those who need them
        from engines.checkpoints.loading.modules import load_modules  # noqa: PLC0415 - as above

    with as_folder(checkpoint, progress) as config:
        with progress.stage("reading the weights"):
            modules = load_modules(config, checkpoint)
        return _traced(config, modules, checkpoint, out, wanted=wanted, key=key, earlier=earlier, progress=progress)


def _warn_of_memory(checkpoint: Checkpoint, progress: Progress) -> None:
    """Tell before minutes of work that the system may end it: it would do so without a word."""
    needed = _MEMORY_PER_WEIGHT * sum(count_parameters(checkpoint).values())
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        progress.note(
            f"warning: exporting takes about {needed / 1e9:.0f} GB of memory, and here are {present / 1e9:.0f}: the "
            "system may end it. Export on a larger machine: the bundle can be copied, and compiled here."
        )


def _traced(  # noqa: PLR0913 - all that a new manifest is made of
    config: CheckpointConfig,
    modules: Modules,
    checkpoint: Checkpoint,
    out: Path,
    *,
    wanted: BundleSpec,
    key: str,
    earlier: Manifest | None,
    progress: Progress,
) -> Manifest:
    from engines.export.preview import fit_rgb  # noqa: PLC0415 - as above
    from engines.export.run import export_graphs, export_tokenizer  # noqa: PLC0415 - as above

    out.mkdir(parents=True, exist_ok=True)
    known: dict[GraphName, Any] = earlier.graphs if earlier else {}
    size = (*wanted.resolutions, config.size)[0]
    graphs = export_graphs(
        config,
        modules,
        out,
        storage=wanted.weights,
        typed=wanted.typed,
        size=size,
        known=known,
        progress=progress,
    )
    with progress.stage("fitting previews"):
        preview = fit_rgb(modules.vae, config.latent)
    manifest = Manifest(
        name=checkpoint.name,
        source=checkpoint.source,
        weights=wanted.weights,
        trained_size=config.size,
        preview=preview,
        resolutions=(size,),
        rows=wanted.rows,
        latent=config.latent,
        context=config.context,
        tokenizer=export_tokenizer(config, checkpoint.learned_tokens, out),
        noise_schedule=config.noise_schedule,
        defaults=Defaults(scheduler=config.scheduler),
        graphs=graphs,
        builds=earlier.builds if earlier else {},
        versions={package: version(package) for package in _EXPORTERS},
        export_key=key,
    )
    return _described(manifest, wanted)


def _export_key(checkpoint: Checkpoint, weights: Storage) -> str:
    return export_key(checkpoint.source, weights, {package: _version(package) for package in _EXPORTERS})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise EngineError(
            f"Exporting a checkpoint needs the package {package}: pip install 'latentd[build]'. "
            "A bundle that was exported elsewhere needs none: build_engines.py compile BUNDLE."
        ) from None
