"""A model's own trajectory from noise to an image: INT8 is calibrated on it, and engines are compared along it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engines.accuracy import AccuracyError, check_finite
from engines.backends.device import Device, Engine
from engines.build.served_shapes import ServedShapes
from engines.contract import (
    DECODERS,
    GRAPHS,
    LANES,
    MASK,
    PLAIN_STEPS,
    PROMPT_POOLS,
    TIME_IDS,
    Array,
    Arrays,
    GraphName,
    build_inputs,
    sizes_of,
)
from engines.errors import EngineError
from engines.manifest import Manifest, Size
from engines.progress import Progress
from engines.schedulers import Scheduler, Step, complete, find, table

CALIBRATED: tuple[GraphName, ...] = (*PLAIN_STEPS, *DECODERS.values())  # for INT8
CALIBRATION_STEPS = 20  # denoising steps of each trajectory that INT8 is calibrated on; fewer where requests take fewer
_MANY_WEIGHTS = 10**9  # of a graph, of which memory shall hold no copies
_PROMPTS = (
    "a photograph of a lighthouse on a rock in the sea",
    "portrait of an old man with a red hat, oil on canvas",
    "a cat asleep on a blue sofa",
)
_GUIDANCE = 5.0
_SHALLOW_STRIDE = 3  # INT8 is calibrated on every third shallow step: their features are megabytes


RunGraph = Callable[[GraphName, Arrays], dict[str, Array]]  # the outputs of a graph by name, for its inputs


class NotFiniteError(EngineError):
    """A graph computes NaN or infinity: every image of the model would fail."""


class GraphRunner:
    """Runs a bundle's graphs on one device, over arrays. Each graph is loaded when it is first called.

    On a device that pads, calls have the shapes of a server's, which are the only ones that engines take.
    """

    def __init__(self, manifest: Manifest, device: Device, files: Mapping[GraphName, Path]) -> None:
        self._manifest = manifest
        self._device = device
        self._stream = device.stream("graphs", urgent=True)
        self._files = files
        self._engines: dict[GraphName, Engine] = {}

    def __call__(self, graph: GraphName, inputs: Arrays) -> dict[str, Array]:
        """The outputs of `graph` by name. Raises EngineError."""
        if not self._device.pads:
            return self._run(graph, inputs)
        served = ServedShapes(self._manifest, graph, inputs)
        return served.cut(self._run(graph, served.inputs))

    def _run(self, graph: GraphName, inputs: Arrays) -> dict[str, Array]:
        if graph not in self._engines:
            self._engines[graph] = self._device.load(self._files[graph], self._stream)
        bound = {name: self._device.allocate(array.shape, array.dtype) for name, array in inputs.items()}
        for name, array in inputs.items():
            self._stream.write(bound[name], array)
        sizes = self._sizes(graph, inputs)
        outputs = {
            port.name: self._device.allocate(port.shape(sizes), port.dtype) for port in self._manifest.outputs(graph)
        }
        self._engines[graph].bind({**bound, **outputs}).launch()
        return {name: self._stream.read(buffer).result() for name, buffer in outputs.items()}

    def _sizes(self, graph: GraphName, inputs: Arrays) -> dict[str, int]:
        """The sizes of all dimensions: the model's, and those of `inputs`."""
        varying = sizes_of(self._manifest.inputs(graph), {name: array.shape for name, array in inputs.items()})
        if graph in DECODERS.values():
            varying["H"] = varying["h"] * self._manifest.latent.downscale
            varying["W"] = varying["w"] * self._manifest.latent.downscale
        return {**self._manifest.dims(self._manifest.resolutions[0]), **varying}


def finite(graphs: RunGraph, remedy: Callable[[GraphName], str]) -> RunGraph:
    """`graphs`, with NotFiniteError where an output holds NaN or infinity, which says the `remedy` for that graph."""

    def run(graph: GraphName, inputs: Arrays) -> dict[str, Array]:
        outputs = graphs(graph, inputs)
        try:
            check_finite(outputs)
        except AccuracyError as error:
            raise NotFiniteError(f"{graph} computes no finite values ({error}): {remedy(graph)}.") from error
        return outputs

    return run


def reference(manifest: Manifest, bundle: Path) -> RunGraph:
    """The FP32 graphs in ONNX Runtime on this machine's processor. Raises NotFiniteError where they compute NaN."""
    files = {name: bundle / graph.onnx["fp32"].files[0].path for name, graph in manifest.graphs.items()}
    return finite(
        GraphRunner(manifest, reference_device(manifest), files),
        lambda graph: (
            f"the weights of {graph} in {manifest.source.name} are damaged, or overflow even FP32; download the "
            "checkpoint again, and build it with --force"
        ),
    )


def reference_device(manifest: Manifest) -> Device:
    """ONNX Runtime on this machine's processor; for large models as frugal as it can be."""
    from engines.backends import onnxruntime  # noqa: PLC0415 - a backend is imported when it is opened

    is_large = max(manifest.parameters.values(), default=0) > _MANY_WEIGHTS
    return onnxruntime.open_device(threads=0, is_frugal=is_large)


@dataclass(frozen=True, slots=True)
class Recording:
    """The graphs' inputs along one trajectory, and its results."""

    full: tuple[dict[str, Array], ...]  # inputs of the denoise graph, by step
    shallow: tuple[dict[str, Array], ...]  # of the shallow one from the second step, with the previous step's features
    state: Array  # [1, LANES, c, h, w], after the last step
    images: Array  # [1, H, W, 3], uint8


class Trajectory:
    """One image from its prompt, with the bundle's default scheduler, and guided where its requests are by default."""

    def __init__(
        self,
        manifest: Manifest,
        bundle: Path,
        *,
        steps: int,
        prompt: str | None = None,
        guidance: float | None = None,
        seed: int = 1,
    ) -> None:
        """`steps` counts denoising steps; without a `prompt` it is the first of the model's examples.

        Without `guidance` it is one at which models of all kinds are compared; `seed` is that of the initial noise.
        """
        self._manifest = manifest
        self.table = table(_scheduler(manifest, steps), steps, manifest.noise_schedule)
        self._guidance = _guidance(manifest) if guidance is None else guidance
        self._seed = seed
        self.size: Size = manifest.resolutions[0]
        self.steps = len(self.table.steps)
        self.chunks = _chunks(manifest, bundle, prompt or prompts_of(manifest)[0])
        self._rows = 1 if manifest.embeds_guidance or self._guidance == 1 else 2
        own = {"S": 1, "C": 2, "L": 1, "B": 1, "R": self._rows, "P": self._rows, "n": 1}
        self._sizes = {**manifest.dims(self.size), **own}

    def run(self, graphs: RunGraph, on_step: Callable[[], None] = lambda: None) -> Recording:
        """Run the trajectory on `graphs`, from prompt to image.

        Raises:
            EngineError: a graph cannot be run, or is `finite` and computes NaN or infinity.
        """
        noise = self._latents(self._seed)
        state = np.zeros((1, LANES, *noise.shape[1:]), np.float32)
        state[:, 0] = noise * self.table.init_scale
        encoded = [graphs("encode_prompt", inputs) for inputs in self.chunks]
        pools = self._masked(graphs) | {
            pool: np.concatenate([one[output] for one in encoded])
            for pool, output in PROMPT_POOLS.items()
            if output in encoded[0]
        }
        full, features = list[dict[str, Array]](), list[Array]()
        for step in self.table.steps:
            full.append(self._inputs("denoise", {"state": state, **pools, **self._step_values(step)}))
            outputs = graphs("denoise", full[-1])
            state = outputs["state_next"]
            features.append(outputs["features"])
            on_step()
        shallow = (
            self._inputs("denoise_shallow", {**inputs, "features": earlier, "row_feature": np.arange(self._rows)})
            for inputs, earlier in zip(full[1:], features, strict=False)
        )
        return Recording(tuple(full), tuple(shallow), state, graphs("decode", decode_inputs(state))["images"])

    def encode_inputs(self, images: Array) -> dict[str, Array]:
        """The inputs that encode `images` [1, H, W, 3] u8; of UNets that inpaint, without their upper half."""
        values = {"images": images, "noise": np.ones(self._shape, np.float32)}
        if self._manifest.is_for_inpainting:
            values[MASK.name] = np.ones(images.shape[:3], np.uint8)
            values[MASK.name][:, images.shape[1] // 2 :] = 0
        return self._inputs("encode_image", values)

    def _masked(self, graphs: RunGraph) -> dict[str, Array]:
        """The pool of UNets that inpaint, which are to paint the whole image; empty for others."""
        if not self._manifest.is_for_inpainting:
            return {}
        values = {"images": np.zeros((1, self.size.height, self.size.width, 3), np.uint8), "noise": self._latents(3)}
        values[MASK.name] = np.ones(values["images"].shape[:3], np.uint8)
        latents = graphs("encode_image", self._inputs("encode_image", values))["latents"]
        return {"inpaint": np.stack([latents, np.ones_like(latents), np.zeros_like(latents)], axis=1)}

    def _inputs(self, graph: GraphName, values: Arrays) -> dict[str, Array]:
        return build_inputs(self._manifest.inputs(graph), self._sizes, values)

    def _step_values(self, step: Step) -> dict[str, Array]:
        """The inputs of one step that are not neutral; Ho & Salimans (2022), eq. 6, unless the UNet embeds guidance."""
        weights = [self._guidance, 1 - self._guidance] if self._rows == 2 else [1.0]
        embeds = self._manifest.embeds_guidance
        further: dict[str, Array] = {"guidance_embedded": np.full(1, self._guidance - 1, np.float32)} if embeds else {}
        if TIME_IDS in self._manifest.inputs("denoise"):
            side = [self.size.height, self.size.width]
            further[TIME_IDS.name] = np.array([[*side, 0, 0, *side]] * self._rows, np.float32)
        return {
            "noise": self._latents(2),
            "row_context": np.arange(self._rows)[:, None],
            "timestep": np.full(self._rows, step.timestep, np.float32),
            "guidance": np.array([weights], np.float32),
            "scale": np.array([step.scale], np.float32),
            "coef": step.matrix[None].astype(np.float32),
            **further,
        }

    def _latents(self, seed: int) -> Array:
        """Standard noise [1, c, h, w]."""
        return np.random.default_rng(seed).standard_normal(self._shape, np.float32)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (1, *(self._sizes[dim] for dim in "chw"))


def record(manifest: Manifest, bundle: Path, progress: Progress) -> dict[GraphName, list[dict[str, Array]]]:
    """The inputs of the graphs in `CALIBRATED` along trajectories to the model's examples. Takes minutes."""
    graphs = reference(manifest, bundle)
    found: dict[GraphName, list[dict[str, Array]]] = {name: [] for name in CALIBRATED}
    length = _calibration_steps(manifest)
    trajectories = [Trajectory(manifest, bundle, steps=length, prompt=one) for one in prompts_of(manifest)]
    total, steps = sum(trajectory.steps for trajectory in trajectories), count(1)
    with progress.stage("recording trajectories to calibrate on") as stage:
        for trajectory in trajectories:
            recording = trajectory.run(graphs, lambda: stage.update(next(steps), total))
            found["denoise"] += recording.full
            found["denoise_shallow"] += recording.shallow[::_SHALLOW_STRIDE]
            for name in DECODERS.values():
                found[name].append(decode_inputs(recording.state))
    return found


def calibration_config(manifest: Manifest) -> dict[str, Any]:
    """What `record` depends on, as JSON: the FP32 graphs, and the trajectories that it follows."""
    return {
        "graphs": [file.sha256 for name in GRAPHS for file in manifest.graphs[name].onnx["fp32"].files],
        "tokenizer": [manifest.tokenizer.file.sha256, manifest.tokenizer.pad],
        "prompts": prompts_of(manifest),
        "steps": _calibration_steps(manifest),
        "size": manifest.resolutions[0].model_dump(),
        "scheduler": manifest.defaults.scheduler,
        **manifest.defaults.model_dump(include={"timestep_spacing", "eta"}, exclude_none=True),
        **({} if _guidance(manifest) == _GUIDANCE else {"guidance": _guidance(manifest)}),
        "noise_schedule": manifest.noise_schedule.model_dump(),
    }


def decode_inputs(state: Array) -> dict[str, Array]:
    """A decoder's inputs for the first slot of `state` [S, LANES, c, h, w]."""
    return {"state": state, "slot": np.zeros(1, np.int64)}


def _scheduler(manifest: Manifest, steps: int) -> Scheduler:
    return complete(find(manifest.defaults.scheduler), manifest.defaults, num_steps=steps)


def _calibration_steps(manifest: Manifest) -> int:
    """As many as requests take by default: few-step models are not made for more."""
    return min(CALIBRATION_STEPS, manifest.defaults.num_inference_steps)


def _guidance(manifest: Manifest) -> float:
    """Of trajectories: models that are distilled to do without it would not draw what they draw for requests."""
    return _GUIDANCE if manifest.defaults.guidance_scale > 1 else 1.0


def prompts_of(manifest: Manifest) -> tuple[str, ...]:
    """Three prompts, as far as possible the model's examples: others would calibrate on images that it cannot draw."""
    return (*manifest.examples, *_PROMPTS)[: len(_PROMPTS)]


def _chunks(manifest: Manifest, bundle: Path, prompt: str) -> tuple[dict[str, Array], ...]:
    """The text encoder's inputs for `prompt`, and for the empty prompt."""
    tokenizer = Tokenizer.from_file(str(bundle / manifest.tokenizer.file.path))
    tokenizer.enable_truncation(manifest.context.tokens)
    return tuple(_chunk(manifest, tokenizer.encode(text).ids, is_empty=not text) for text in (prompt, ""))


def _chunk(manifest: Manifest, ids: Sequence[int], *, is_empty: bool) -> dict[str, Array]:
    context, pads = manifest.context, {"ids": manifest.tokenizer.pad, "ids_2": manifest.tokenizer.pad_2}
    values = {
        name: np.array([[*ids, *[pad] * (context.tokens - len(ids))]], np.int64)
        for name, pad in pads.items()
        if pad is not None
    }
    if is_empty and context.force_zeros_for_empty_prompt:
        values["weights"] = np.zeros((1, context.tokens), np.float32)
    sizes = {"N": 1, "T": context.tokens}
    return build_inputs(manifest.inputs("encode_prompt"), sizes, {**values, "layer": np.array([context.layers])})
