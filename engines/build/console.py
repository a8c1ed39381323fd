"""What a build shows: bars where people watch, plain lines where a log does, JSON where a program does, and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from engines.build.profiles import shapes
from engines.contract import GRAPHS, INPAINT_LANES, LANES, STEPS, GraphName
from engines.manifest import Build, Compiled, FusionReport, Geometry, Manifest, Precision
from engines.progress import Stage

# Bytes per latent of a row, or per pixel: what TensorRT for RTX says of SD 1.x in FP16.
_ACTIVATIONS = {"denoise": 10_000, "denoise_shallow": 10_000, "decode": 1_600, "encode_image": 810}
_BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a weight


class BuildProgress:
    """`engines.progress.Progress` on a terminal: a spinner or a bar per stage. A context manager."""

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
        if self._depth:
            self._bars.remove_task(task)  # inner stages make room once they are done
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


class BuildLog:
    """`engines.progress.Progress` as plain lines: one when a stage begins, one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put away."""

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
        """A log has no bars."""

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class BuildFeed:
    """`engines.progress.Progress` for another program: JSON lines, which tell how far the outermost stage is.

    `{"stage": "compiling denoise for tensorrt", "percent": 40}`, with null until the stage says how long it is, and
    `{"note": "denoise of tensorrt: unchanged"}`.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._open: list[_Share] = []
        self._percent: int | None = None  # of the outermost stage, as it was told

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        self._open.append(_Share(name, self._advance))
        if len(self._open) == 1:
            self._tell_percent(None)
        try:
            yield self._open[-1]
        finally:
            ended = self._open.pop()
            if self._open and ended.total:
                self._open[-1].passed += (1 - self._open[-1].passed) / 2

    def note(self, text: str) -> None:
        self._tell({"note": text})

    def _advance(self) -> None:
        percent = int(100 * _fraction(self._open))
        if self._percent is None or percent > self._percent:  # which stages that begin anew would have fall
            self._tell_percent(percent)

    def _tell_percent(self, percent: int | None) -> None:
        self._percent = percent
        self._tell({"stage": self._open[0].name, "percent": percent})

    def _tell(self, said: Mapping[str, object]) -> None:
        self._file.write(json.dumps(said) + "\n")
        self._file.flush()


@dataclass(slots=True)
class _Share:
    """A stage of which `done` of `total` is finished, and `passed` of the step after that.

    Nobody says how many stages lie within a step, so each is taken for half of what is left of it.
    """

    name: str
    changed: Callable[[], None]
    done: float = 0
    total: float = 0  # 0 until it is known
    passed: float = 0

    def update(self, done: float, total: float) -> None:
        if done != self.done:
            self.passed = 0
        self.done, self.total = done, total
        self.changed()


def _fraction(stages: Sequence[_Share]) -> float:
    """How much of the outermost of `stages` is done, each of them within the one before."""
    within = 0.0
    for stage in reversed(stages):
        if stage.total:
            step = stage.passed + (1 - stage.passed) / 2 * within
            within = min((stage.done + step) / stage.total, 1.0)
    return within


def terminal() -> Console:
    """Standard error; wide enough for the tables where it is no terminal."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=140)


def progress_on(console: Console) -> BuildProgress | BuildLog:
    return BuildProgress(console) if console.is_terminal else BuildLog(console)


def plan_table(
    backend: str, geometry: Geometry, precisions: Mapping[GraphName, Precision], parameters: Mapping[GraphName, int]
) -> RenderableType:
    """What will be built, with the memory it will take. `parameters` counts the weights, as far as they are known."""
    table = _table(f"To build for {backend}", "graph", "precision", "profiles", "weights MB", "activations MB, about")
    for name, precision in precisions.items():
        weights = _BYTES[precision] * parameters.get(name, 0)
        table.add_row(
            name, precision, _asked_profiles(geometry, name), _mb(weights or None), _mb(_activations(geometry, name))
        )
    table.caption = f"state pools: {_mb(_state_bytes(geometry))} MB; activations as in FP16, twice that in FP32"
    return table


def summary_table(manifest: Manifest, backend: str) -> RenderableType:
    """What was compiled: sizes, build times, memory, and how far it strays from FP32."""
    build = manifest.builds[backend]
    table = _table(
        f"{manifest.name} for {backend} {build.version}",
        *("graph", "precision", "MB", "profiles", "activations MB", "built in", "peak MB", "largest error"),
    )
    for name in GRAPHS:
        engine = build.engines[name]
        table.add_row(
            name,
            engine.precision,
            _mb(sum(file.size for file in engine.files)),
            _profiles(engine),
            _sizes(engine),
            f"{engine.seconds:.1f} s" if engine.seconds else "-",
            _mb(engine.memory) if engine.memory else "-",
            f"{engine.difference.largest:.1e}" if engine.difference else "-",
        )
    table.caption = verdict(build)
    return table


def inspect_tables(manifest: Manifest) -> RenderableType:
    """The whole manifest as people read it."""
    facts = _table(manifest.name, "", "")
    facts.show_header = False
    for key, value in _facts(manifest):
        facts.add_row(key, value)
    parts: list[RenderableType] = [facts, _graph_table(manifest)]
    for backend, build in manifest.builds.items():
        parts.append(summary_table(manifest, backend))
        if any(engine.layers for engine in build.engines.values()):
            parts.append(_layer_table(backend, build))
    return Group(*parts)


def verdict(build: Build) -> str:
    """What verification found, in words."""
    if not build.verification:
        return "not yet verified: run build_engines.py verify on a machine that runs it"
    found = build.verification
    pictures = "the same picture" if found.psnr >= 999 else f"{found.psnr:.1f} dB"
    return f"verified beside FP32 in ONNX Runtime: {pictures} at {found.size}, {found.steps} steps"


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "source", f"{manifest.source.name} (sha256 {manifest.source.sha256[:12]})"
    for lora in manifest.source.loras:
        yield "LoRA", lora
    for embedding in manifest.source.embeddings:
        yield "embedding", embedding
    if manifest.source.decoder:
        yield "decoder", manifest.source.decoder
    yield "resolutions", ", ".join(map(str, manifest.resolutions))
    yield "row buckets", ", ".join(map(str, manifest.rows))
    yield "prediction", manifest.noise_schedule.prediction_type
    yield "context", f"{manifest.context.tokens} tokens of {manifest.context.width}, {manifest.context.layers} layers"
    defaults = manifest.defaults
    yield (
        "defaults",
        f"{defaults.scheduler}, {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}",
    )
    yield "weights", f"stored in {manifest.weights}"
    yield "exported by", ", ".join(f"{package} {version}" for package, version in manifest.versions.items())


def _graph_table(manifest: Manifest) -> Table:
    table = _table("ONNX graphs", "graph", "computes in", "file", "MB with weights", "largest error beside torch")
    for name, graph in manifest.graphs.items():
        for precision, onnx in graph.onnx.items():
            size = sum(file.size for file in onnx.files)
            table.add_row(name, precision, onnx.files[0].path, _mb(size), f"{onnx.difference.largest:.1e}")
    return table


def _layer_table(backend: str, build: Build) -> Table:
    table = _table(f"Layers of {backend}", "graph", "layers", "attentions fused", "GroupNorms fused", "layers by type")
    for name, engine in build.engines.items():
        if layers := engine.layers:
            table.add_row(name, str(layers.total), *_fused(layers), _precisions(layers))
    return table


def _fused(layers: FusionReport) -> tuple[str, str]:
    return (
        f"{layers.fused_attentions} of {layers.attentions}",
        f"{layers.fused_group_norms} of {layers.group_norms}",
    )


def _precisions(layers: FusionReport) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(layers.precisions.items(), key=lambda item: -item[1]))


def _profiles(engine: Compiled) -> str:
    if not engine.profiles:
        return "any shape"
    return ", ".join(f"{profile.size or 'prompt'}×{profile.batch}" for profile in engine.profiles)


def _sizes(engine: Compiled) -> str:
    """Activation memory by profile, where a GPU has told it."""
    known = [_mb(profile.activations) for profile in engine.profiles if profile.activations is not None]
    return ", ".join(known) or "-"


def _asked_profiles(geometry: Geometry, name: GraphName) -> str:
    return ", ".join(f"{one.profile.size or 'prompt'}×{one.profile.batch}" for one in shapes(geometry, name))


def _activations(geometry: Geometry, name: GraphName) -> float:
    """Of the largest profile; what others need lies within it."""
    if name == "encode_prompt":
        return geometry.context.tokens * geometry.context.width * 32
    profiles = [shape.profile for shape in shapes(geometry, name)]
    unit = geometry.latent.downscale**2 if name in STEPS else 1
    areas = [one.size.width * one.size.height / unit * one.batch for one in profiles if one.size]
    return max(areas) * _ACTIVATIONS[name]


def _state_bytes(geometry: Geometry) -> int:
    """Two pools per size and what is kept for inpainting, f32."""
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
