"""The model's own way from noise to a picture: what INT8 is calibrated on, and what engines are compared along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.backends.device import Device, Engine
from engines.backends.registry import open_device
from engines.contract import INPAINT_LANES, LANES, STEPS, Array, GraphName, TensorSpec
from engines.manifest import Manifest, Size
from engines.progress import Progress

Inputs = Mapping[str, Array]

CALIBRATED: tuple[GraphName, ...] = (*STEPS, "decode")  # for INT8
CALIBRATION_STEPS = 20  # of each trajectory that INT8 is calibrated on
_PROMPTS = (
    "a photograph of a lighthouse on a rock in the sea",
    "portrait of an old man with a red hat, oil on canvas",
    "a cat asleep on a blue sofa",
)
_GUIDANCE = 5.0
_THINNED = 3  # one in so many shallow steps is calibrated on


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


class Graphs:
    """A bundle's graphs on one device, as functions. Each is loaded when it is first called."""

    def __init__(self, manifest: Manifest, device: Device, files: Mapping[GraphName, Path]) -> None:
        self._manifest = manifest
        self._device = device
        self._stream = device.stream("graphs", urgent=True)
        self._files = files
        self._engines: dict[GraphName, Engine] = {}

    def __call__(self, graph: GraphName, inputs: Inputs) -> dict[str, Array]:
        """The outputs of `graph` by name. Raises EngineError."""
        if graph not in self._engines:
            self._engines[graph] = self._device.load(self._files[graph], self._stream)
        given = {name: self._device.allocate(array.shape, array.dtype) for name, array in inputs.items()}
        for name, array in inputs.items():
            self._stream.write(given[name], array)
        sizes = self._sizes(graph, inputs)
        made = {
            spec.name: self._device.allocate(_shape(spec, sizes), spec.dtype)
            for spec in self._manifest.graphs[graph].outputs
        }
        self._engines[graph].bind({**given, **made}).launch()
        return {name: self._stream.read(buffer).result() for name, buffer in made.items()}

    def _sizes(self, graph: GraphName, inputs: Inputs) -> dict[str | int, int]:
        """Of the dimensions that have a name, as `inputs` have them."""
        sizes: dict[str | int, int] = {}
        for port in self._manifest.graphs[graph].inputs:
            sizes.update(zip(port.shape, inputs[port.name].shape, strict=True))
        if graph == "decode":
            sizes["H"] = sizes["h"] * self._manifest.latent.downscale
            sizes["W"] = sizes["w"] * self._manifest.latent.downscale
        return sizes


def _shape(spec: TensorSpec, sizes: Mapping[str | int, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)


def reference(manifest: Manifest, bundle: Path) -> Graphs:
    """The FP32 graphs in ONNX Runtime on this machine's processor."""
    files = {name: bundle / graph.onnx["fp32"].files[0].path for name, graph in manifest.graphs.items()}
    return Graphs(manifest, open_device("onnxruntime"), files)


@dataclass(frozen=True, slots=True)
class Walk:
    """What one trajectory passed through."""

    inputs: tuple[dict[str, Array], ...]  # of the denoise graph, by step
    shallow: tuple[dict[str, Array], ...]  # of the shallow one, with the features of the step before; not of the first
    state: Array  # [1, LANES, c, h, w], after the last step
    pictures: Array  # [1, H, W, 3], uint8


class Trajectory:
    """How one guided picture comes about."""

    def __init__(
        self, manifest: Manifest, bundle: Path, table: Table, *, size: Size, prompt: str | None = None
    ) -> None:
        self._manifest = manifest
        self._table = table
        latent = manifest.latent
        self._latent_shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        self.size = size
        self.chunks = _chunks(manifest, bundle, prompt or _prompts(manifest)[0])

    def walk(self, graphs: Graphs, each: Callable[[], None] = lambda: None) -> Walk:
        """The whole way on `graphs`, from the prompt to the picture; `each` hears of every step. Raises EngineError."""
        state = np.zeros((1, LANES, *self._latent_shape), np.float32)
        noise = np.random.default_rng(1).standard_normal(self._latent_shape, np.float32)
        state[0, 0] = noise * self._table.init_scale
        context = np.concatenate([graphs("encode_prompt", inputs)["embeddings"] for inputs in self.chunks])
        passed, features = list[dict[str, Array]](), list[Array]()
        for step in self._table.steps:
            passed.append(self._inputs(step, state, context))
            made = graphs("denoise", passed[-1])
            state = made["state_next"]
            features.append(made["features"])
            each()
        shallow = (
            {**inputs, "features": earlier, "row_feature": np.arange(len(earlier))}
            for inputs, earlier in zip(passed[1:], features, strict=False)
        )
        return Walk(tuple(passed), tuple(shallow), state, graphs("decode", decode_inputs(state))["images"])

    def _inputs(self, step: Step, state: Array, context: Array) -> dict[str, Array]:
        embeds = self._manifest.embeds_guidance
        rows = 1 if embeds else 2
        weights = [1.0] if embeds else [_GUIDANCE, 1 - _GUIDANCE]
        told = {"guidance_embedded": np.full(rows, _GUIDANCE - 1, np.float32)} if embeds else {}
        return {
            "state": state,
            "context": context,
            "kept": np.zeros((1, INPAINT_LANES, *self._latent_shape), np.float32),
            "noise": np.random.default_rng(2).standard_normal((1, *self._latent_shape), np.float32),
            "slot": np.zeros(1, np.int64),
            "row_image": np.zeros(rows, np.int64),
            "row_context": np.arange(rows)[:, None],
            "timestep": np.full(rows, step.timestep, np.float32),
            "guidance": np.array([weights], np.float32),
            "scale": np.array([step.scale], np.float32),
            "coef": step.matrix[None].astype(np.float32),
            "level": np.zeros((1, 2), np.float32),
            **told,
        }


def recorded(
    manifest: Manifest, bundle: Path, table: Table, progress: Progress
) -> dict[GraphName, list[dict[str, Array]]]:
    """What the graphs that are `CALIBRATED` are given on the model's own ways to its examples."""
    graphs = reference(manifest, bundle)
    found: dict[GraphName, list[dict[str, Array]]] = {name: [] for name in CALIBRATED}
    prompts, steps = _prompts(manifest), count(1)
    with progress.stage("recording trajectories to calibrate on") as stage:
        for prompt in prompts:
            way = Trajectory(manifest, bundle, table, size=manifest.resolutions[0], prompt=prompt)
            walk = way.walk(graphs, lambda: stage.update(next(steps), len(prompts) * len(table.steps)))
            found["denoise"] += walk.inputs
            found["denoise_shallow"] += walk.shallow[::_THINNED]  # features are megabytes
            found["decode"].append(decode_inputs(walk.state))
    return found


def decode_inputs(state: Array) -> dict[str, Array]:
    """What decodes the first slot."""
    return {"state": state, "slot": np.zeros(1, np.int64)}


def _prompts(manifest: Manifest) -> tuple[str, ...]:
    """Three that the model knows how to draw, as far as it says; others reach corners that nobody asks for."""
    return (*manifest.examples, *_PROMPTS)[: len(_PROMPTS)]


def _chunks(manifest: Manifest, bundle: Path, prompt: str) -> tuple[Inputs, Inputs]:
    """What encodes a prompt, and the empty one."""
    tokenizer = Tokenizer.from_file(str(bundle / manifest.tokenizer.file.path))
    tokenizer.enable_truncation(manifest.context.tokens)
    tokenizer.enable_padding(length=manifest.context.tokens, pad_id=manifest.tokenizer.pad)
    last, plain = np.array([manifest.context.layers]), np.ones((1, manifest.context.tokens), np.float32)
    of, empty = (np.array([tokenizer.encode(text).ids], np.int64) for text in (prompt, ""))
    return {"ids": of, "layer": last, "weights": plain}, {"ids": empty, "layer": last, "weights": plain}
