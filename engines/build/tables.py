"""Tables about builds and bundles: what will be built, what was built, and what a bundle holds."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table

from engines.accuracy import IDENTICAL
from engines.build.api import BackendPlan, Finding
from engines.build.profiles import shapes
from engines.contract import INPAINT_LANES, LANES, STEPS, GraphName, plain
from engines.manifest import Build, Compiled, Defaults, File, FusionReport, Geometry, LoraCapacity, Manifest, Precision

_ROOT = Path(__file__).parents[2]
# Bytes per latent of a row, or per pixel, as TensorRT for RTX reports them for SD 1.x in FP16.
_ACTIVATIONS = {
    "denoise": 10_000,
    "denoise_shallow": 10_000,
    "decode": 1_600,
    "decode_fast": 420,
    "encode_image": 810,
    "safety": 100,
}
_BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}  # of a weight
_UNKNOWN = "-"


def serve_command(bundle: Path) -> str:
    """The command that serves a bundle, from a source checkout or from the installed package."""
    script = _ROOT / "scripts" / "serve"
    if not script.is_file():
        return shlex.join(["latentd", "--bundle", str(bundle)])
    here = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join([str(here), "--bundle", str(bundle)])


def plan_table(plan: BackendPlan) -> RenderableType:
    """What will be compiled for a backend, and the memory it will take."""
    columns = ("graph", "precision", "profiles", "weights MB", "activations MB, about")
    rows = []
    for name, precision in plan.precisions.items():
        weights = _BYTES[precision] * plan.parameters.get(plain(name), 0)
        activations = _activations(plan.geometry, name)
        rows.append((name, precision, _planned_profiles(plan.geometry, name), _mb(weights or None), _mb(activations)))
    table = _table(f"To build for {plan.backend}", columns, rows)
    table.caption = f"state pools: {_mb(_state_bytes(plan.geometry))} MB; activations as in FP16, twice that in FP32"
    return table


def summary_table(manifest: Manifest, backend: str) -> RenderableType:
    """The engines of a backend: sizes, build times, memory, and differences from FP32."""
    build = manifest.builds[backend]
    columns = (
        "graph",
        "precision",
        "MB",
        "profiles",
        "activations MB",
        "built in",
        "peak MB",
        "largest error",
        "error of 8 bits",
    )
    rows = [(name, *_engine_cells(build.engines[name])) for name in manifest.graph_names]
    table = _table(f"{manifest.name} for {backend} {build.version}", columns, rows)
    table.caption = "; ".join((*_build_time(build), verdict(build)))
    return table


def _engine_cells(engine: Compiled) -> tuple[str, ...]:
    return (
        engine.precision,
        _mb(_size(engine.files)),
        _profiles(engine),
        _profile_activations(engine),
        _built_in(engine),
        _mb(engine.memory) if engine.memory else _UNKNOWN,
        f"{engine.difference.largest:.1e}" if engine.difference else _UNKNOWN,
        f"{engine.quantization.largest:.1e}" if engine.quantization else _UNKNOWN,
    )


def _built_in(engine: Compiled) -> str:
    """The seconds of compiling, and what made them fewer or more."""
    if not engine.seconds:
        return _UNKNOWN
    level = "" if engine.optimization_level is None else f", level {engine.optimization_level}"
    reused = f", {engine.reused_timings} timings reused" if engine.reused_timings else ""
    return f"{engine.seconds:.1f} s{level}{reused}"


def _build_time(build: Build) -> Iterator[str]:
    if seconds := sum(engine.seconds for engine in build.engines.values()):
        yield f"built in {seconds:,.0f} s" if seconds < 600 else f"built in {seconds / 60:.0f} min"


def inspect_tables(manifest: Manifest) -> RenderableType:
    """The contents of a manifest: its properties, its graphs, and the engines of each backend."""
    properties = _table(manifest.name, ("", ""), [*_source_properties(manifest), *_model_properties(manifest)])
    properties.show_header = False
    parts: list[RenderableType] = [properties, _graph_table(manifest)]
    for backend, build in manifest.builds.items():
        parts.append(summary_table(manifest, backend))
        if any(engine.layers for engine in build.engines.values()):
            parts.append(_layer_table(backend, build))
    return Group(*parts)


def findings_tables(findings: Sequence[Finding]) -> RenderableType:
    """Where engines stray from FP32."""
    if not findings:
        return "Nothing diverges: every engine that runs here agrees with its FP32 graph."
    return Group(*(_finding_table(finding) for finding in findings))


def _finding_table(finding: Finding) -> Table:
    first = finding.first
    where = f"first at {first.operator} {first.node} ({first.scope})" if first else "but not once tensors are marked"
    columns = ("tensor", "operator", "module", "largest error", "of the range", "FP32 up to", "engine up to")
    rows = [
        (
            f"> {row.place.tensor}" if row.place == first else row.place.tensor,
            row.place.operator,
            row.place.scope,
            *(f"{value:.2g}" for value in (row.reading.error, row.reading.relative)),
            *(f"{value:.3g}" for value in (row.reading.expected, row.reading.computed)),
        )
        for row in finding.rows
    ]
    table = _table(f"{finding.graph} of {finding.backend} strays ({finding.inputs}), {where}", columns, rows)
    table.caption = escape(f"{finding.advice[0].upper()}{finding.advice[1:]} ({finding.rounds} rounds)")
    return table


def verdict(build: Build) -> str:
    """The result of the verification, in one sentence."""
    if not build.verification:
        return "not yet verified: run build_engines.py verify on a machine that runs it"
    found = build.verification
    similarity = "the same image" if found.psnr >= IDENTICAL else f"{found.psnr:.1f} dB"
    return f"verified against FP32 in ONNX Runtime: {similarity} at {found.size}, {found.steps} steps"


def _source_properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    source = manifest.source
    yield "source", f"{source.name} (sha256 {source.sha256[:12]})"
    yield from (("LoRA", lora) for lora in source.loras)
    yield from (("embedding", embedding) for embedding in source.embeddings)
    if source.decoder:
        yield "fast decoder", source.decoder


def _model_properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    context, defaults = manifest.context, manifest.defaults
    yield "resolutions", ", ".join(map(str, manifest.resolutions))
    yield "row buckets", ", ".join(map(str, manifest.rows))
    yield "prediction", manifest.noise_schedule.prediction_type
    yield "context", f"{context.tokens} tokens of {context.width}, {context.layers} layers"
    yield "defaults", ", ".join(_request_defaults(defaults))
    yield "weights", f"stored in {manifest.weights}"
    yield "pools", f"{_mb(manifest.pool_bytes)} MB of the device's memory, besides weights and activations"
    if manifest.lora:
        yield "LoRAs", _loras(manifest, manifest.lora)
    yield "exported by", ", ".join(f"{package} {version}" for package, version in manifest.versions.items())


def _request_defaults(defaults: Defaults) -> Iterator[str]:
    yield defaults.scheduler
    yield f"{defaults.num_inference_steps} steps"
    yield f"guidance {defaults.guidance_scale:g}"
    if defaults.timestep_spacing:
        yield f"timesteps {defaults.timestep_spacing}"
    if defaults.eta is not None:
        yield f"eta {defaults.eta:g}"
    if defaults.timesteps:
        yield f"timesteps {' '.join(map(str, defaults.timesteps))}"


def _loras(manifest: Manifest, capacity: LoraCapacity) -> str:
    """What the LoRA pool holds, and what LoRAs update."""
    counts = Counter(layer.part for layer in manifest.lora_layers)
    layers = f"{counts['unet']} layers of the UNet and {counts['text_encoder']} of the text encoder"
    refused = f"; {len(manifest.lora_refused)} convolutions are not" if manifest.lora_refused else ""
    pool = f"{capacity.slots} of rank {capacity.rank} on the device ({_mb(manifest.lora_bytes)} MB)"
    return f"{pool}, {layers} are updated{refused}"


def _graph_table(manifest: Manifest) -> Table:
    columns = ("graph", "computes in", "file", "MB with weights", "largest error against torch")
    rows = [
        (name, precision, onnx.files[0].path, _mb(_size(onnx.files)), f"{onnx.difference.largest:.1e}")
        for name, graph in manifest.graphs.items()
        for precision, onnx in graph.onnx.items()
    ]
    return _table("ONNX graphs", columns, rows)


def _layer_table(backend: str, build: Build) -> Table:
    columns = (
        "graph",
        "layers",
        "attentions fused",
        "GroupNorms fused",
        "convolutions channels last",
        "layers by type",
    )
    rows = [
        (name, str(engine.layers.total), *_fused(engine.layers), _layer_types(engine.layers))
        for name, engine in build.engines.items()
        if engine.layers
    ]
    return _table(f"Layers of {backend}", columns, rows)


def _fused(layers: FusionReport) -> tuple[str, str, str]:
    return (
        f"{layers.fused_attentions} of {layers.attentions}",
        f"{layers.fused_group_norms} of {layers.group_norms}",
        f"{layers.channels_last} of {layers.convolutions}" if layers.convolutions else _UNKNOWN,
    )


def _layer_types(layers: FusionReport) -> str:
    types = sorted(layers.precisions.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {kind}" for kind, count in types) or _UNKNOWN


def _profiles(engine: Compiled) -> str:
    if not engine.profiles:
        return "any shape"
    return ", ".join(f"{profile.size or 'prompt'}×{profile.batch}" for profile in engine.profiles)


def _profile_activations(engine: Compiled) -> str:
    """Activation memory by profile, where a GPU has measured it."""
    known = [_mb(profile.activations) for profile in engine.profiles if profile.activations is not None]
    return ", ".join(known) or _UNKNOWN


def _planned_profiles(geometry: Geometry, name: GraphName) -> str:
    return ", ".join(f"{one.profile.size or 'prompt'}×{one.profile.batch}" for one in shapes(geometry, name))


def _activations(geometry: Geometry, name: GraphName) -> float:
    """Bytes of activations of the largest profile, which contain those of the others."""
    if plain(name) == "encode_prompt":
        return geometry.context.tokens * geometry.context.width * 32
    profiles = [shape.profile for shape in shapes(geometry, name)]
    unit = geometry.latent.downscale**2 if name in STEPS else 1
    areas = [one.size.width * one.size.height / unit * one.batch for one in profiles if one.size]
    return max(areas) * _ACTIVATIONS[plain(name)]


def _state_bytes(geometry: Geometry) -> int:
    """Bytes of two state pools and of the inpainting latents per size, f32."""
    latent = geometry.latent
    pixels = sum(size.width * size.height for size in geometry.resolutions) // latent.downscale**2
    return 4 * geometry.slots * (2 * LANES + INPAINT_LANES) * latent.channels * pixels


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns of which nothing is known. The first column is never cut; others wrap."""
    known = [index for index in range(len(columns)) if index == 0 or any(row[index] != _UNKNOWN for row in rows)]
    heads = [Column(columns[index], no_wrap=index == 0, overflow="fold") for index in known]
    table = Table(*heads, title=title, title_justify="left", caption_justify="left")
    for row in rows:
        table.add_row(*(escape(row[index]) for index in known))
    return table


def _size(files: Sequence[File]) -> int:
    return sum(file.size for file in files)


def _mb(size: float | None) -> str:
    if size is None:
        return _UNKNOWN
    return f"{size / 1e6:.1f}" if size < 100e6 else f"{size / 1e6:,.0f}"
