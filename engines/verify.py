"""How far a backend's engines stray from the FP32 graphs in ONNX Runtime, on noise and on the model's own way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.base import LANES, Array, Device, Engine, EngineError, TensorSpec, open_device
from engines.manifest import (
    GRAPHS,
    Build,
    Compiled,
    Difference,
    GraphName,
    Manifest,
    Precision,
    Profile,
    Size,
    Verification,
)
from engines.profiles import shapes
from engines.progress import Progress

Inputs = Mapping[str, Array]

STEPS = 6  # of the trajectory that engines are compared on
CALIBRATION_STEPS = 20  # of those that INT8 is calibrated on
_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1, "int8": 2.5e-1}  # largest error, relative to the range
_ROUNDING = 2 / 255  # of pictures: a value between two levels may become either
_PROMPTS = (
    "a photograph of a lighthouse on a rock in the sea",
    "portrait of an old man with a red hat, oil on canvas",
    "a cat asleep on a blue sofa",
)
_GUIDANCE = 5.0
_IDENTICAL = 999.0  # dB


class Step(Protocol):
    """One UNet call of a scheduler's table."""

    @property
    def timestep(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def matrix(self) -> NDArray[np.float64]: ...


class Table(Protocol):
    """A scheduler worked out for some steps: what the server multiplies by, and what verification follows."""

    @property
    def init_scale(self) -> float: ...
    @property
    def steps(self) -> Sequence[Step]: ...


class VerificationError(EngineError):
    """An engine computes something else than its graph."""


class Graphs:
    """A bundle's graphs on one device, as functions. Each is loaded when it is first called."""

    def __init__(self, manifest: Manifest, device: Device, files: Mapping[GraphName, Path]) -> None:
        self._manifest = manifest
        self._device = device
        self._files = files
        self._engines: dict[GraphName, Engine] = {}

    def __call__(self, graph: GraphName, inputs: Inputs) -> Array:
        """Run `graph` once. Raises EngineError."""
        if graph not in self._engines:
            self._engines[graph] = self._device.load(self._files[graph])
        buffers = {name: self._device.allocate(array.shape, array.dtype) for name, array in inputs.items()}
        for name, array in inputs.items():
            buffers[name].write(array)
        spec = self._manifest.graphs[graph].outputs[0]
        output = self._device.allocate(self._shape(graph, spec, inputs), spec.dtype)
        self._engines[graph].bind({**buffers, spec.name: output}).run()
        return output.read()

    def _shape(self, graph: GraphName, spec: TensorSpec, inputs: Inputs) -> tuple[int, ...]:
        sizes: dict[str | int, int] = {}
        for port in self._manifest.graphs[graph].inputs:
            sizes.update(zip(port.shape, inputs[port.name].shape, strict=True))
        if graph == "decode":
            sizes["H"] = sizes["h"] * self._manifest.latent.downscale
            sizes["W"] = sizes["w"] * self._manifest.latent.downscale
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)


def reference(manifest: Manifest, bundle: Path) -> Graphs:
    """The FP32 graphs in ONNX Runtime on this machine's processor."""
    files = {name: bundle / graph.onnx["fp32"].files[0].path for name, graph in manifest.graphs.items()}
    return Graphs(manifest, open_device("onnxruntime"), files)


class Trajectory:
    """One guided picture on its way from noise, with every input that the graphs were given on it."""

    def __init__(
        self, manifest: Manifest, bundle: Path, table: Table, *, size: Size, prompt: str | None = None
    ) -> None:
        self._manifest = manifest
        self._table = table
        latent = manifest.latent
        self._latent_shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        self.size = size
        self.ids = _token_ids(manifest, bundle, prompt or _prompts(manifest)[0])

    def start(self, graphs: Graphs) -> tuple[Array, Array]:
        """The first state [1, LANES, c, h, w], and the embeddings [2, L, D] of a prompt and of none."""
        state = np.zeros((1, LANES, *self._latent_shape), np.float32)
        noise = np.random.default_rng(1).standard_normal(self._latent_shape, np.float32)
        state[0, 0] = noise * self._table.init_scale
        context = np.concatenate([graphs("encode_prompt", {"ids": ids[None]}) for ids in self.ids])
        return state, context

    def steps(self, graphs: Graphs, state: Array, context: Array) -> Iterator[tuple[dict[str, Array], Array]]:
        """The inputs of each step, and the state that `graphs` make of them."""
        for step in self._table.steps:
            inputs = self._inputs(step, state, context)
            state = graphs("denoise", inputs)
            yield inputs, state

    def picture(self, graphs: Graphs) -> Array:
        """The whole way: prompt to picture [H, W, 3]."""
        state, context = self.start(graphs)
        for _inputs, following in self.steps(graphs, state, context):
            state = following
        picture: Array = graphs("decode", decode_inputs(state))[0]
        return picture

    def _inputs(self, step: Step, state: Array, context: Array) -> dict[str, Array]:
        embeds = self._manifest.embeds_guidance
        rows = 1 if embeds else 2
        weights = [1.0] if embeds else [_GUIDANCE, 1 - _GUIDANCE]
        told = {"guidance_embedded": np.full(rows, _GUIDANCE - 1, np.float32)} if embeds else {}
        return {
            "state": state,
            "context": context,
            "noise": np.random.default_rng(2).standard_normal((1, *self._latent_shape), np.float32),
            "slot": np.zeros(1, np.int64),
            "row_image": np.zeros(rows, np.int64),
            "row_context": np.arange(rows),
            "timestep": np.full(rows, step.timestep, np.float32),
            "guidance": np.array([weights], np.float32),
            "scale": np.array([step.scale], np.float32),
            "coef": step.matrix[None].astype(np.float32),
            **told,
        }


def recorded(manifest: Manifest, bundle: Path, table: Table, progress: Progress) -> list[dict[str, Array]]:
    """The denoise graph's inputs along the model's own trajectories, for calibration. Its examples are the prompts."""
    graphs, found = reference(manifest, bundle), list[dict[str, Array]]()
    prompts = _prompts(manifest)
    with progress.stage("recording trajectories to calibrate on") as stage:
        for prompt in prompts:
            way = Trajectory(manifest, bundle, table, size=manifest.resolutions[0], prompt=prompt)
            for inputs, _state in way.steps(graphs, *way.start(graphs)):
                found.append(inputs)
                stage.update(len(found), len(prompts) * len(table.steps))
    return found


def verify(manifest: Manifest, bundle: Path, backend: str, *, table: Table, progress: Progress) -> Build:
    """Run the engines of `backend` beside the FP32 graphs; the build, with what was found written in.

    Raises:
        EngineError: the backend does not run on this machine, or an engine differs by more than its precision explains.
    """
    build = manifest.builds[backend]
    files = {name: bundle / engine.files[0].path for name, engine in build.engines.items()}
    exact, graphs = reference(manifest, bundle), Graphs(manifest, open_device(backend), files)
    trajectory = Trajectory(manifest, bundle, table, size=manifest.resolutions[0])
    engines = {}
    for name in GRAPHS:
        with progress.stage(f"verifying {name} of {backend}"):
            engine = build.engines[name]
            found = _differences(name, manifest, trajectory, exact=exact, graphs=graphs, compiled=engine)
            worst = _worst(found)
        _refuse(backend, name, worst, tolerance(engine.precision, manifest.graphs[name].outputs[0]))
        engines[name] = engine.model_copy(update={"difference": worst})
    with progress.stage(f"comparing a picture of {backend}"):
        decibels = psnr(trajectory.picture(graphs), trajectory.picture(exact))
    beside = Verification(psnr=round(decibels, 1), size=trajectory.size, steps=len(table.steps))
    return build.model_copy(update={"engines": engines, "verification": beside})


def difference_of(actual: Array, expected: Array) -> Difference:
    """Errors relative to the largest expected value. Raises VerificationError where there are values that are none."""
    wide, wanted = actual.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(wide).all():
        raise VerificationError("The output holds NaN or infinity.")
    errors = np.abs(wide - wanted) / max(float(np.abs(wanted).max()), 1e-6)
    return Difference(largest=float(errors.max()), mean=float(errors.mean()))


def tolerance(precision: Precision, output: TensorSpec) -> float:
    """The largest error, relative to the range, that computing in `precision` explains."""
    return max(_TOLERANCE[precision], _ROUNDING if output.dtype == "uint8" else 0.0)


def psnr(picture: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    error = float(np.mean((picture.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else _IDENTICAL


def decode_inputs(state: Array) -> dict[str, Array]:
    """What decodes lane 0 of the first slot."""
    return {"state": state, "slot": np.zeros(1, np.int64), "lane": np.zeros(1, np.int64)}


def _differences(
    name: GraphName, manifest: Manifest, trajectory: Trajectory, *, exact: Graphs, graphs: Graphs, compiled: Compiled
) -> Iterator[Difference]:
    profiles = compiled.profiles or (shapes(manifest, name)[0].profile,)  # what takes any shape takes them all alike
    for inputs, first in _cases(name, manifest, trajectory, exact=exact, profiles=profiles):
        expected = exact(name, first)
        actual = graphs(name, inputs)
        yield difference_of(actual[: len(expected)], expected)


def _cases(
    name: GraphName, manifest: Manifest, trajectory: Trajectory, *, exact: Graphs, profiles: Sequence[Profile]
) -> Iterator[tuple[Inputs, Inputs]]:
    """Inputs for the engines, and the part of them that their reference is worked out for: the first image."""
    if name == "encode_prompt":
        yield from (({"ids": ids[None]},) * 2 for ids in trajectory.ids)
        return
    for profile in profiles:
        yield _random_case(name, manifest, profile)
    state, context = trajectory.start(exact)
    for inputs, following in trajectory.steps(exact, state, context):
        state = following
        if name == "denoise":
            yield inputs, inputs
    if name == "decode":
        yield decode_inputs(state), decode_inputs(state)
    if name == "encode_image":
        picture = exact("decode", decode_inputs(state))
        inputs = {"images": picture, "noise": np.ones((1, *state.shape[2:]), np.float32)}
        yield inputs, inputs


def _random_case(name: GraphName, manifest: Manifest, profile: Profile) -> tuple[Inputs, Inputs]:
    """A full batch of noise for one profile; the reference computes its first image only."""
    assert profile.size is not None  # noqa: S101 - every graph but encode_prompt has one
    maker: Any = {"denoise": _random_denoise, "decode": _random_decode, "encode_image": _random_encode}[name]
    inputs: Inputs = maker(manifest, profile.size, profile.batch, np.random.default_rng(3))
    alone = {
        key: array[:1, :1] if key == "guidance" else array if key == "context" else array[:1]
        for key, array in inputs.items()
    }
    return inputs, alone


def _latents(manifest: Manifest, size: Size) -> tuple[int, int, int]:
    latent = manifest.latent
    return latent.channels, size.height // latent.downscale, size.width // latent.downscale


def _random_denoise(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    """A batch of unguided images, each in the slot of its own number."""
    latents = _latents(manifest, size)
    told = {"guidance_embedded": random.uniform(0, 10, batch).astype(np.float32)} if manifest.embeds_guidance else {}
    context = (min(batch, manifest.context_rows), manifest.context.tokens, manifest.context.width)
    coef = np.zeros((batch, LANES, LANES + 1), np.float32)
    coef[:, 0, 1] = coef[:, 1:4, 3:6] = 1  # x becomes the model's output
    return {
        "state": random.standard_normal((batch, LANES, *latents), np.float32),
        "context": random.standard_normal(context, np.float32),
        "noise": random.standard_normal((batch, *latents), np.float32),
        "slot": np.arange(batch),
        "row_image": np.arange(batch),
        "row_context": np.arange(batch),
        "timestep": random.uniform(0, manifest.noise_schedule.num_train_timesteps - 1, batch).astype(np.float32),
        "guidance": np.eye(batch, dtype=np.float32),
        "scale": np.ones(batch, np.float32),
        "coef": coef,
        **told,
    }


def _random_decode(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    state = random.standard_normal((batch, LANES, *_latents(manifest, size)), np.float32)
    return {"state": state, "slot": np.arange(batch), "lane": np.zeros(batch, np.int64)}


def _random_encode(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    images = random.integers(0, 256, (batch, size.height, size.width, 3), np.uint8)
    return {"images": images, "noise": random.standard_normal((batch, *_latents(manifest, size)), np.float32)}


def _prompts(manifest: Manifest) -> tuple[str, ...]:
    """Three that the model knows how to draw, as far as it says; others reach corners that nobody asks for."""
    return (*manifest.examples, *_PROMPTS)[: len(_PROMPTS)]


def _token_ids(manifest: Manifest, bundle: Path, prompt: str) -> tuple[Array, Array]:
    """A prompt and the empty one, [L] int64 each."""
    tokenizer = Tokenizer.from_file(str(bundle / manifest.tokenizer.file.path))
    tokenizer.enable_truncation(manifest.context.tokens)
    tokenizer.enable_padding(length=manifest.context.tokens, pad_id=manifest.tokenizer.pad)
    return np.array(tokenizer.encode(prompt).ids, np.int64), np.array(tokenizer.encode("").ids, np.int64)


def _worst(differences: Iterator[Difference]) -> Difference:
    found = list(differences)
    return Difference(largest=max(one.largest for one in found), mean=max(one.mean for one in found))


def _refuse(backend: str, name: GraphName, found: Difference, allowed: float) -> None:
    if not found.largest <= allowed:
        raise VerificationError(
            f"{name} of {backend} differs from the FP32 graph by {found.largest:.1e} of its range, more than "
            f"{allowed:.0e}: its pictures would not be the model's. Choose a higher --precision."
        )
