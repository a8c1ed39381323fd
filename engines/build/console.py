"""The display of a build: progress as bars on a terminal, lines in a log or JSON for a program, and tables."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engines.accuracy import IDENTICAL
from engines.build.api import BackendPlan
from engines.build.profiles import shapes
from engines.contract import GRAPHS, INPAINT_LANES, LANES, STEPS, GraphName
from engines.manifest import Build, Compiled, FusionReport, Geometry, Manifest, Precision
from engines.progress import Stage

_ROOT = Path(__file__).parents[2]
# Bytes per latent of a row, or per pixel, as TensorRT for RTX reports them for SD 1.x in FP16.
_ACTIVATIONS = {"denoise": 10_000, "denoise_shallow": 10_000, "decode": 1_600, "encode_image": 810}
_BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a weight


class BarDisplay:
    """Progress on a terminal: a spinner or a bar per stage. A context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._depth = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        task = self._bars.add_task("  " * self._depth + name, total=None)
        self._depth += 1
        try:
            yield _Bar(self._bars, task)
        except BaseException:
            self._bars.stop_task(task)
            raise
        finally:
            self._depth -= 1
        self._finish(task)

    def _finish(self, task: TaskID) -> None:
        """Complete the bar of an outermost stage, which stays visible; remove that of a nested one."""
        if self._depth:
            self._bars.remove_task(task)
        else:
            total = self._bars.tasks[self._bars.task_ids.index(task)].total or 1
            self._bars.update(task, total=total, completed=total)

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, done: float, total: float) -> None:
        self._bars.update(self._task, completed=done, total=total)


class LogDisplay:
    """Progress as plain lines: one when an outermost stage begins, one when it ends. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: a log holds no resources."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        began = time.monotonic()
        if self._depth == 0:
            self.note(f"{name} ...")
        self._depth += 1
        try:
            yield self
        finally:
            self._depth -= 1
        if self._depth == 0:
            self.note(f"{name}: {time.monotonic() - began:.1f} s")

    def update(self, done: float, total: float) -> None:
        """Do nothing: a log has no bars."""

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class JsonDisplay:
    """Progress for another program: JSON lines with the percentage of the outermost stage. A context manager.

    `{"stage": "compiling denoise for tensorrt", "percent": 40}`, with null until the stage reports its length, and
    `{"note": "denoise of tensorrt: unchanged"}`.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._stages: list[_NestedStage] = []  # from the outermost to the innermost
        self._percent: int | None = None  # of the outermost stage, as last written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: the file is the caller's."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        self._stages.append(_NestedStage(name, self._on_update))
        if len(self._stages) == 1:
            self._write_percent(None)
        try:
            yield self._stages[-1]
        finally:
            ended = self._stages.pop()
            if self._stages and ended.total:
                self._stages[-1].end_nested()

    def note(self, text: str) -> None:
        self._write({"note": text})

    def _on_update(self) -> None:
        percent = int(100 * _fraction(self._stages))
        if self._percent is None or percent > self._percent:  # a nested stage may begin again, which would lower it
            self._write_percent(percent)

    def _write_percent(self, percent: int | None) -> None:
        self._percent = percent
        self._write({"stage": self._stages[0].name, "percent": percent})

    def _write(self, message: Mapping[str, object]) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()


@dataclass(slots=True)
class _NestedStage:
    """A stage of which `done` of `total` units are finished, and the fraction `within` of the unit in progress.

    The number of stages that are nested in a unit is unknown, so each counts for half of what is left of the unit.
    """

    name: str
    on_update: Callable[[], None]
    done: float = 0
    total: float = 0  # 0: not yet known
    within: float = 0

    def update(self, done: float, total: float) -> None:
        if done != self.done:
            self.within = 0
        self.done, self.total = done, total
        self.on_update()

    def end_nested(self) -> None:
        self.within = self.within_at(1)

    def within_at(self, nested: float) -> float:
        """The finished fraction of the unit in progress, when the fraction `nested` of a nested stage is finished."""
        return self.within + (1 - self.within) / 2 * nested


def _fraction(stages: Sequence[_NestedStage]) -> float:
    """The finished fraction of the outermost of `stages`, each of them nested in the one before."""
    nested = 0.0
    for stage in reversed(stages):
        if stage.total:
            nested = min((stage.done + stage.within_at(nested)) / stage.total, 1.0)
    return nested


Display = BarDisplay | LogDisplay | JsonDisplay


def terminal() -> Console:
    """A console on standard error, wide enough for the tables if it is not a terminal."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=140)


def display_on(console: Console) -> BarDisplay | LogDisplay:
    """Bars if the console is a terminal, lines if it is a log."""
    return BarDisplay(console) if console.is_terminal else LogDisplay(console)


def serve_command(bundle: Path) -> str:
    """The command that serves a bundle, from a source checkout or from the installed package."""
    script = _ROOT / "scripts" / "serve"
    if not script.is_file():
        return shlex.join(["latentd", "--bundle", str(bundle)])
    here = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join([str(here), "--bundle", str(bundle)])


def plan_table(plan: BackendPlan) -> RenderableType:
    """What will be compiled for a backend, and the memory it will take."""
    table = _table(
        f"To build for {plan.backend}", "graph", "precision", "profiles", "weights MB", "activations MB, about"
    )
    for name, precision in plan.precisions.items():
        weights = _BYTES[precision] * plan.parameters.get(name, 0)
        activations = _activations(plan.geometry, name)
        table.add_row(name, precision, _planned_profiles(plan.geometry, name), _mb(weights or None), _mb(activations))
    table.caption = f"state pools: {_mb(_state_bytes(plan.geometry))} MB; activations as in FP16, twice that in FP32"
    return table


def summary_table(manifest: Manifest, backend: str) -> RenderableType:
    """The engines of a backend: sizes, build times, memory, and differences from FP32."""
    build = manifest.builds[backend]
    table = _table(
        f"{manifest.name} for {backend} {build.version}",
        *("graph", "precision", "MB", "profiles", "activations MB", "built in", "peak MB", "largest error"),
    )
    for name in GRAPHS:
        table.add_row(name, *_engine_cells(build.engines[name]))
    table.caption = verdict(build)
    return table


def _engine_cells(engine: Compiled) -> tuple[str, ...]:
    return (
        engine.precision,
        _mb(sum(file.size for file in engine.files)),
        _profiles(engine),
        _profile_activations(engine),
        f"{engine.seconds:.1f} s" if engine.seconds else "-",
        _mb(engine.memory) if engine.memory else "-",
        f"{engine.difference.largest:.1e}" if engine.difference else "-",
    )


def inspect_tables(manifest: Manifest) -> RenderableType:
    """The contents of a manifest: its properties, its graphs, and the engines of each backend."""
    properties = _table(manifest.name, "", "")
    properties.show_header = False
    for key, value in (*_source_properties(manifest), *_model_properties(manifest)):
        properties.add_row(key, value)
    parts: list[RenderableType] = [properties, _graph_table(manifest)]
    for backend, build in manifest.builds.items():
        parts.append(summary_table(manifest, backend))
        if any(engine.layers for engine in build.engines.values()):
            parts.append(_layer_table(backend, build))
    return Group(*parts)


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
        yield "decoder", source.decoder


def _model_properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    context, defaults = manifest.context, manifest.defaults
    requests = f"{defaults.scheduler}, {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}"
    yield "resolutions", ", ".join(map(str, manifest.resolutions))
    yield "row buckets", ", ".join(map(str, manifest.rows))
    yield "prediction", manifest.noise_schedule.prediction_type
    yield "context", f"{context.tokens} tokens of {context.width}, {context.layers} layers"
    yield "defaults", requests
    yield "weights", f"stored in {manifest.weights}"
    yield "exported by", ", ".join(f"{package} {version}" for package, version in manifest.versions.items())


def _graph_table(manifest: Manifest) -> Table:
    table = _table("ONNX graphs", "graph", "computes in", "file", "MB with weights", "largest error against torch")
    for name, graph in manifest.graphs.items():
        for precision, onnx in graph.onnx.items():
            size = sum(file.size for file in onnx.files)
            table.add_row(name, precision, onnx.files[0].path, _mb(size), f"{onnx.difference.largest:.1e}")
    return table


def _layer_table(backend: str, build: Build) -> Table:
    table = _table(f"Layers of {backend}", "graph", "layers", "attentions fused", "GroupNorms fused", "layers by type")
    for name, engine in build.engines.items():
        if layers := engine.layers:
            table.add_row(name, str(layers.total), *_fused(layers), _layer_types(layers))
    return table


def _fused(layers: FusionReport) -> tuple[str, str]:
    return (
        f"{layers.fused_attentions} of {layers.attentions}",
        f"{layers.fused_group_norms} of {layers.group_norms}",
    )


def _layer_types(layers: FusionReport) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(layers.precisions.items(), key=lambda item: -item[1]))


def _profiles(engine: Compiled) -> str:
    if not engine.profiles:
        return "any shape"
    return ", ".join(f"{profile.size or 'prompt'}×{profile.batch}" for profile in engine.profiles)


def _profile_activations(engine: Compiled) -> str:
    """Activation memory by profile, where a GPU has measured it."""
    known = [_mb(profile.activations) for profile in engine.profiles if profile.activations is not None]
    return ", ".join(known) or "-"


def _planned_profiles(geometry: Geometry, name: GraphName) -> str:
    return ", ".join(f"{one.profile.size or 'prompt'}×{one.profile.batch}" for one in shapes(geometry, name))


def _activations(geometry: Geometry, name: GraphName) -> float:
    """Bytes of activations of the largest profile, which contain those of the others."""
    if name == "encode_prompt":
        return geometry.context.tokens * geometry.context.width * 32
    profiles = [shape.profile for shape in shapes(geometry, name)]
    unit = geometry.latent.downscale**2 if name in STEPS else 1
    areas = [one.size.width * one.size.height / unit * one.batch for one in profiles if one.size]
    return max(areas) * _ACTIVATIONS[name]


def _state_bytes(geometry: Geometry) -> int:
    """Bytes of two state pools and of the inpainting latents per size, f32."""
    latent = geometry.latent
    pixels = sum(size.width * size.height for size in geometry.resolutions) // latent.downscale**2
    return 4 * geometry.slots * (2 * LANES + INPAINT_LANES) * latent.channels * pixels


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(Text(column))
    return table


def _mb(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:.1f}" if size < 100e6 else f"{size / 1e6:,.0f}"
