"""The device memory of images of one size: slots in a state pool, and the engines bound to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.backends.device import ALIGNMENT, Buffer, Call, Device, Engine, Reading, Stream
from engines.contract import (
    GUIDANCE_EFFECT,
    INPAINT_LANES,
    LANES,
    LORA_GRAPHS,
    MASK,
    OUTPUTS,
    STEPS,
    Array,
    DecoderName,
    GraphName,
    Port,
    build_inputs,
    neutral,
)
from engines.errors import EngineError
from engines.manifest import Manifest, Size
from server.requests.depths import DEPTHS, Depth
from server.requests.params import GenerationParams, Image, Mask, PixelMask
from server.requests.request import Request
from server.runtime.pipeline.admission import DecodeCall, Start
from server.runtime.pipeline.noise import NoiseGenerator
from server.runtime.pipeline.plan import Plan, StepShape
from server.runtime.pipeline.streams import Streams

Latents = NDArray[np.float32]  # [channels, h, w]
Lanes = Sequence[Latents | Mask]  # those of the pool `inpaint` that are not 0, of one image

_GRAPHS: dict[Depth, GraphName] = {"full": "denoise", "shallow": "denoise_shallow"}
_MOST_BOUND = 64  # shapes of steps, where any may come; each holds a plan's buffers, up to a megabyte


@dataclass(frozen=True, slots=True)
class _BoundStep:
    """The denoise engine bound for one shape: once from each state buffer to the other."""

    plan: PlanMemory
    calls: tuple[Call, Call]
    features: Buffer  # those that a full step makes, or a shallow one takes
    effect: Buffer  # of guidance, by image


@dataclass(frozen=True, slots=True)
class _BoundCall:
    """An engine other than the denoise engines with its buffers, by port."""

    buffers: Mapping[str, Buffer]
    call: Call


class PlanMemory:
    """The inputs of a step that the host writes. All but the noise lie in one block, which one copy fills.

    Inputs that plans do not give stay at their neutral value.
    """

    def __init__(self, device: Device, ports: Sequence[Port], sizes: Mapping[str, int]) -> None:
        """Lay out those of a graph's input `ports` that belong to plans, with the `sizes` of one step's dimensions."""
        arrays = build_inputs([port for port in ports if port.role == "plan"], sizes)
        ends = np.cumsum([_aligned(array.nbytes) for array in arrays.values()]).tolist()
        offsets = dict(zip(arrays, [0, *ends], strict=False))
        self._host = np.zeros(ends[-1], np.uint8)
        self._parts = {name: _part(self._host, array, offsets[name]) for name, array in arrays.items()}
        for name, array in arrays.items():
            self._parts[name][:] = array
        self._block = device.allocate(self._host.shape, np.uint8, purpose="plans")
        self._noise = {
            port.name: device.allocate(port.shape(sizes), port.dtype, purpose="plans")
            for port in ports
            if port.role == "noise"
        }
        self.buffers: dict[str, Buffer] = self._noise | {
            name: self._block.view(array.shape, array.dtype, offset=offsets[name]) for name, array in arrays.items()
        }

    def write(self, plan: Plan, stream: Stream) -> None:
        """Write a plan of the same shape to the device. Without new noise the old stays, which is finite."""
        for name, array in plan.arrays.items():
            if name in self._noise:
                stream.write(self._noise[name], array)
            else:
                self._parts[name][:] = array
        stream.write(self._block, self._host)


class LatentPool:
    """The state pool of one image size: two buffers, of which a step reads one and writes the other.

    Nothing here waits for the device. A slot may be reused while its last step is still in flight, because the stream
    keeps the order.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        size: Size,
        manifest: Manifest,
        *,
        engines: Mapping[GraphName, Engine],
        device: Device,
        streams: Streams,
        pools: Mapping[str, Buffer],
        made_features: Buffer,
        decode_chunk: int,
    ) -> None:
        """`engines` were loaded for their streams; at most `decode_chunk` images are decoded in one call.

        All sizes share `pools`, those of prompts and LoRAs by port, and `made_features`, memory for those of one full
        step.
        """
        self.size = size
        self._dims = manifest.dims(size)
        self.latent_shape = (self._dims["c"], self._dims["h"], self._dims["w"])
        self.spare = manifest.max_rows  # the last of the slots, and of the feature places, is for padding
        self._slots = list(range(manifest.max_rows))
        self._entries = list(range(manifest.max_rows))
        self._places = list(range(manifest.max_rows))
        self._device = device
        self._streams = streams
        self._parity = 0  # which of the states is current
        self._inputs = {graph: manifest.inputs(graph) for graph in engines}
        self._outputs = {graph: manifest.outputs(graph) for graph in engines}
        of_steps = [port for graph in STEPS if graph in engines for port in self._inputs[graph]]
        own = {port.name: port for port in of_steps if port.role == "pool"}
        state = own.pop("state")
        self._states = tuple(self._allocate_pool(state) for _ in range(2))
        self._staging = self._allocate_pool(state, S=manifest.max_rows)
        self._state_lanes = tuple(map(self._lanes_of, self._states))
        self._staging_lanes = self._lanes_of(self._staging)
        self._pools = {name: pools.get(name) or self._allocate_pool(port) for name, port in own.items()}
        (self._features,) = (port for port in OUTPUTS["denoise"] if port.name == "features")
        self._made_features = made_features
        self._denoise = {graph: engines[graph] for graph in STEPS if graph in engines}
        self._steps: dict[StepShape, _BoundStep] = {}
        staged = {"state": self._staging}
        vae = [self._bind("decode", engines, n, staged) for n in range(1, decode_chunk + 1)]
        self._decode: dict[DecoderName, list[_BoundCall]] = {"vae": vae}
        if "decode_fast" in engines:  # over the same memory: calls of the stream run one after the other
            self._decode["fast"] = [self._bind("decode_fast", engines, n + 1, one.buffers) for n, one in enumerate(vae)]
        self._encode = self._bind("encode_image", engines, 1, {})
        self._safety = [
            self._bind("safety", engines, n, {"images": decode.buffers["images"]})
            for n, decode in enumerate(vae, start=1)
            if "safety" in engines
        ]

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The depths of steps that can be taken: without the step cache only full ones."""
        return tuple(depth for depth in DEPTHS if _GRAPHS[depth] in self._denoise)

    @property
    def staged(self) -> int:
        """How many finished images wait for the decoder, or are decoded."""
        return self.spare - len(self._entries)

    @property
    def decode_chunk(self) -> int:
        """The most images that one call decodes."""
        return len(self._decode["vae"])

    @property
    def decoders(self) -> tuple[DecoderName, ...]:
        """The decoders that the model has."""
        return tuple(self._decode)

    def take_slot(self, x: Latents, inpaint: Lanes = ()) -> int:
        """Take a free slot for an image that starts as `x`; `inpaint` are its lanes of that pool, or 0."""
        # All of it is written: the NaN of an earlier image would survive a zero coefficient.
        lanes = np.zeros((LANES, *self.latent_shape), np.float32)
        lanes[0] = x
        kept = np.zeros((INPAINT_LANES, *self.latent_shape), np.float32)
        for lane, values in zip(kept, inpaint, strict=False):
            lane[:] = values
        slot = self._slots[-1]
        self._streams.steps.write(self._states[self._parity], lanes, at=slot)
        self._streams.steps.write(self._pools["inpaint"], kept, at=slot)
        return self._slots.pop()  # not before: a write that fails takes none

    def take_feature_place(self) -> int:
        """Take a free place for the features of a row."""
        return self._places.pop()

    def free_feature_places(self, places: Sequence[int]) -> None:
        self._places.extend(places)

    def free_slots(self, slots: Sequence[int]) -> None:
        self._slots.extend(slots)

    def bind(self, plan: Plan) -> _BoundStep:
        """The denoise engine for steps of the plan's shape; the oldest is dropped when too many are bound.

        Where steps are padded there are as many shapes as were recorded, and none is dropped.
        """
        if plan.shape not in self._steps:
            if not self._device.pads and len(self._steps) == _MOST_BOUND:
                del self._steps[next(iter(self._steps))]
            self._steps[plan.shape] = self._bind_step(plan)
        return self._steps[plan.shape]

    def step(self, plan: Plan) -> Reading | None:
        """Launch one step, and read how much guidance changes each image [B] where a request asks for that.

        Raises EngineError; the state is as before then.
        """
        bound = self.bind(plan)
        steps = self._streams.steps
        bound.plan.write(plan, steps)
        bound.calls[self._parity].launch()
        for row, place in plan.feature_copies:
            steps.copy(bound.features, self._pools["features"], source_at=row, at=place)
        self._parity ^= 1
        return steps.read(bound.effect) if plan.reads_guidance else None

    def read_x0(self, slot: int) -> Reading:
        """The x0 estimate [channels, h, w] of a slot, its last lane."""
        return self._streams.steps.read(self._state_lanes[self._parity], at=slot * LANES + LANES - 1)

    def stage(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Copy finished latents to free entries of the staging pool; their slots may be freed afterwards.

        Only x, the first lane, is copied: the decoder reads no other.
        """
        entries = tuple(self._entries.pop() for _ in slots)
        for slot, entry in zip(slots, entries, strict=True):
            self._streams.steps.copy(
                self._state_lanes[self._parity], self._staging_lanes, source_at=slot * LANES, at=entry * LANES
            )
        return entries

    def decode(self, entries: Sequence[int], decoder: DecoderName = "vae") -> DecodeCall:
        """Launch the decoding of staged latents, at most `decode_chunk`, by `decoder`. Raises EngineError.

        The stream of decodes follows the step that staged them.
        """
        bound, stream = self._decode[decoder][len(entries) - 1], self._streams.decode
        stream.write(bound.buffers["slot"], np.array(entries))
        bound.call.launch()
        images, is_finite = stream.read(bound.buffers["images"]), stream.read(bound.buffers["is_finite"])
        return DecodeCall(images, is_finite, self._check_some(len(entries)) if self._safety else None)

    def free_entries(self, entries: Sequence[int]) -> None:
        """Free entries of the staging pool, once no call reads them."""
        self._entries.extend(entries)

    def start(self, params: GenerationParams, generator: NoiseGenerator) -> Start:
        """Draw what one image starts from, in diffusers' order, and launch the encoding of its initial image.

        Raises EngineError.
        """
        original, masked = params.init_image, params.masked
        image = seen = None
        # UNets that inpaint see what is kept: an image that starts from noise has no other use for it.
        if original and not (masked and original.starts_from_noise):
            image = self._encode_with(original.image, generator.randn(self.latent_shape))
        noise = generator.randn(self.latent_shape)
        if masked:
            seen = self._encode_with(masked.image, generator.randn(self.latent_shape), masked.pixels)
        elif original and original.mask is not None:
            generator.randn(self.latent_shape)  # diffusers encodes the masked image for every UNet
        return Start(noise, image, seen)

    def encode_blank(self) -> None:
        """Encode a blank image, and wait for it. Raises EngineError."""
        blank = np.zeros((self.size.height, self.size.width, 3), np.uint8)
        self._encode_with(blank, np.zeros(self.latent_shape, np.float32)).result()

    def decode_blank(self, images: int, decoder: DecoderName) -> None:
        """Decode blank images in one call, and wait for them. Raises EngineError."""
        self.decode(range(images), decoder).wait()

    def _encode_with(self, image: Image, noise: Latents, mask: PixelMask | None = None) -> Reading:
        """Launch the encoding of `image`; of models that inpaint, without the pixels where `mask` is 1."""
        bound, stream = self._encode, self._streams.encode
        stream.write(bound.buffers["images"], image[None])
        stream.write(bound.buffers["noise"], noise[None])
        if MASK.name in bound.buffers:
            hidden = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
            stream.write(bound.buffers[MASK.name], hidden[None])
        bound.call.launch()
        return stream.read(bound.buffers["latents"])

    def _check_some(self, count: int) -> tuple[Reading, Reading]:
        """Launch the safety checker on the images that were decoded last, and read its scores."""
        bound, stream = self._safety[count - 1], self._streams.decode
        bound.call.launch()
        return stream.read(bound.buffers["concepts"]), stream.read(bound.buffers["special_care"])

    def _allocate_pool(self, port: Port, **sizes: int) -> Buffer:
        """A pool at its neutral value, with `sizes` in place of the model's."""
        dims = {**self._dims, **sizes}
        purpose = f"features of {self.size}" if "f" in port.dims else f"state of {self.size}"
        buffer = self._device.allocate(port.shape(dims), port.dtype, purpose=purpose)
        if port.fill:  # memory is allocated as zeros
            self._streams.steps.write(buffer, neutral(port, dims))
        return buffer

    def _lanes_of(self, state: Buffer) -> Buffer:
        """A state pool [S, LANES, channels, h, w] as one entry per lane, of which copies take only what they need."""
        return state.view((state.shape[0] * LANES, *self.latent_shape), np.float32, offset=0)

    def _bind_step(self, plan: Plan) -> _BoundStep:
        images, rows, chunks, depth, ranks = plan.shape
        graph = LORA_GRAPHS[_GRAPHS[depth]] if ranks else _GRAPHS[depth]
        ports = self._inputs[graph]
        sizes = {**self._dims, "B": images, "R": rows, "L": chunks, "A": ranks}
        memory = PlanMemory(self._device, ports, sizes)
        pools = {port.name: self._pools[port.name] for port in ports if port.name in self._pools}
        if depth == "full":
            shape = self._features.shape({**self._dims, "R": rows})
            pools["features"] = self._made_features.view(shape, self._features.dtype, offset=0)
        effect = self._device.allocate(GUIDANCE_EFFECT.shape(sizes), GUIDANCE_EFFECT.dtype, purpose="plans")
        own = {**memory.buffers, **pools, GUIDANCE_EFFECT.name: effect}
        there, back = (
            self._denoise[graph].bind({**own, "state": current, "state_next": following})
            for current, following in (self._states, self._states[::-1])
        )
        return _BoundStep(memory, (there, back), pools["features"], effect)

    def _bind(
        self, graph: GraphName, engines: Mapping[GraphName, Engine], n: int, pools: Mapping[str, Buffer]
    ) -> _BoundCall:
        """Bind `graph` for `n` images, over `pools` and memory of its own for the other inputs and outputs."""
        sizes = {**self._dims, "n": n}
        buffers = {
            port.name: pools.get(port.name)
            or self._device.allocate(port.shape(sizes), port.dtype, purpose=f"images of {self.size}")
            for port in (*self._inputs[graph], *self._outputs[graph])
        }
        return _BoundCall(buffers, engines[graph].bind(buffers))


def features_bytes(manifest: Manifest) -> int:
    """Bytes of the features that the largest full step makes: of every size, since steps run one after the other."""
    (features,) = (port for port in OUTPUTS["denoise"] if port.name == "features")
    shapes = (features.shape({**manifest.dims(size), "R": manifest.max_rows}) for size in manifest.resolutions)
    return max(map(math.prod, shapes)) * np.dtype(features.dtype).itemsize


def _encoded(reading: Reading) -> Latents:
    """The latents [channels, h, w] that the image encoder made, once they are here. Raises EngineError."""
    latents: Latents = reading.result()[0]
    if not np.isfinite(latents).all():
        raise EngineError("The image encoder computed NaN or infinity: build it in a higher --precision.")
    return latents


def first_latents(request: Request, start: Start) -> tuple[Latents, Lanes]:
    """The first x of one image, noise or the noised init image, and its lanes of the pool `inpaint`.

    Raises EngineError.
    """
    params, table, noise = request.params, request.table, start.noise
    original = params.init_image
    latents = _encoded(start.image) if start.image else None
    x: Latents = noise * np.float32(table.init_scale)
    if original and latents is not None and not original.starts_from_noise:
        signal, sigma = table.steps[0].level
        x = np.float32(signal) * latents + np.float32(sigma) * noise
    if params.masked and start.masked:
        return x, (_encoded(start.masked), params.masked.mask)
    if original and original.mask is not None and latents is not None:
        return x, (latents, noise, np.float32(1) - original.mask)
    return x, ()


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _part(block: Array, like: Array, offset: int) -> Array:
    part: Array = block[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)
    return part
