"""What pictures of one size own on the device: slots in a state pool, and the engines bound to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.backends.device import ALIGNMENT, Buffer, Call, Device, Engine, Event, Reading, Stream
from engines.contract import INPAINT_LANES, LANES, STEPS, Array, GraphName
from engines.errors import EngineError
from engines.manifest import Manifest, Size
from server.requests.request import DEPTHS, Image, Mask
from server.runtime.noise import NoiseGenerator
from server.runtime.plan import Plan, StepShape

Latents = NDArray[np.float32]  # [channels, h, w]

_MOST_BOUND = 64  # shapes of steps, where any may come; each holds a plan's buffers, up to a megabyte


@dataclass(frozen=True, slots=True)
class Streams:
    """The device's work, in three orders: what must not wait for each other."""

    arrivals: Stream  # encoding what newcomers bring
    steps: Stream  # everything that touches the state
    departures: Stream  # decoding what has left the state


@dataclass(frozen=True, slots=True)
class InpaintLatents:
    """What inpainting feature_copies of a picture."""

    latents: Latents
    noise: Latents  # what is laid over them to bring them to a step's noise level
    mask: Mask


@dataclass(frozen=True, slots=True)
class Staged:
    """Finished pictures on their way out of the state pool."""

    entries: tuple[int, ...]  # of the staging pool
    there: Event


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pictures on their way to the host."""

    images: Reading  # [n, H, W, 3] u8
    is_finite: Reading  # [n] f32; 0 where a value was not finite


@dataclass(frozen=True, slots=True)
class _BoundStep:
    """The denoise engine bound for one shape: once from each state buffer to the other."""

    plan: PlanMemory
    calls: tuple[Call, Call]


@dataclass(frozen=True, slots=True)
class _BoundDecode:
    """The decode engine bound for some pictures of the staging pool."""

    slot: Buffer
    images: Buffer
    sound: Buffer
    call: Call


@dataclass(frozen=True, slots=True)
class _BoundEncode:
    """The image encoder bound for one image."""

    image: Buffer
    noise: Buffer
    latents: Buffer
    call: Call


class PlanMemory:
    """A plan's arrays on the device. All but the noise lie in one block, which one copy fills."""

    def __init__(self, device: Device, plan: Plan, latent_shape: tuple[int, int, int]) -> None:
        packed = {name: array for name, array in plan.arrays.items() if name != "noise"}
        ends = np.cumsum([_aligned(array.nbytes) for array in packed.values()]).tolist()
        offsets = dict(zip(packed, [0, *ends], strict=False))
        self._host = np.zeros(ends[-1], np.uint8)
        self._block = device.allocate(self._host.shape, np.uint8, purpose="plans")
        self._noise = device.allocate((plan.shape.images, *latent_shape), np.float32, purpose="plans")
        self._parts = {name: _part(self._host, array, offsets[name]) for name, array in packed.items()}
        self.buffers: dict[str, Buffer] = {"noise": self._noise} | {
            name: self._block.view(array.shape, array.dtype, offset=offsets[name]) for name, array in packed.items()
        }

    def write(self, plan: Plan, stream: Stream) -> None:
        """Bring a plan of the same shape to the device. Old noise stays where nobody asks for new: it is finite."""
        for name, part in self._parts.items():
            part[:] = plan.arrays[name]
        stream.write(self._block, self._host)
        if "noise" in plan.arrays:
            stream.write(self._noise, plan.arrays["noise"])


class LatentPool:
    """The state pool of one picture size: two buffers, of which a step reads one and writes the other.

    Nothing here waits for the device. Slots may be given to others while their last step is still on its way, because
    the stream feature_copies the order.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        size: Size,
        manifest: Manifest,
        *,
        engines: Mapping[GraphName, Engine],
        device: Device,
        streams: Streams,
        context: Buffer,
        decode_chunk: int,
    ) -> None:
        """`engines` were loaded for their streams; at most `decode_chunk` pictures are decoded in one call."""
        latent = manifest.latent
        self.size = size
        self.latent_shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        self.spare = manifest.max_rows  # the last of the slots, and of the places, is for what only fills steps up
        self._slots = list(range(manifest.max_rows))
        self._entries = list(range(manifest.max_rows))
        self._places = list(range(manifest.max_rows))
        self._device = device
        self._streams = streams
        self._context = context
        self._parity = 0  # which of the states is current
        purpose = f"state of {size}"
        shape = (LANES, *self.latent_shape)
        self._states = tuple(device.allocate((manifest.slots, *shape), np.float32, purpose=purpose) for _ in range(2))
        self._kept = device.allocate((manifest.slots, INPAINT_LANES, *self.latent_shape), np.float32, purpose=purpose)
        self._staging = device.allocate((manifest.max_rows, *shape), np.float32, purpose=purpose)
        height, width = self.latent_shape[1:]
        features = (manifest.feature_channels, height, width)
        purpose = f"features of {size}"
        self._features = device.allocate((manifest.feature_places, *features), np.float32, purpose=purpose)
        self._made_features = device.allocate((manifest.max_rows, *features), np.float32, purpose=purpose)
        self._denoise = {depth: engines[graph] for depth, graph in zip(DEPTHS, STEPS, strict=True)}
        self._steps: dict[StepShape, _BoundStep] = {}
        self._decode = [self._bind_decode(engines["decode"], n) for n in range(1, decode_chunk + 1)]
        self._encode = self._bind_encode(engines["encode_image"])

    @property
    def staging_places(self) -> int:
        """How many pictures may finish before one is decoded."""
        return len(self._entries)

    def take_slot(self, x: Latents, kept: InpaintLatents | None) -> int:
        """Take a free slot and begin its picture with `x`, of which inpainting is to keep a part."""
        # All of it is written: a predecessor's NaN would survive a zero coefficient.
        lanes = np.zeros((LANES, *self.latent_shape), np.float32)
        lanes[0] = x
        still = np.zeros((INPAINT_LANES, *self.latent_shape), np.float32)
        if kept:
            still[:] = kept.latents, kept.noise, np.broadcast_to(1 - kept.mask, self.latent_shape)
        slot = self._slots.pop()
        self._streams.steps.write(self._states[self._parity], lanes, at=slot)
        self._streams.steps.write(self._kept, still, at=slot)
        return slot

    def take_feature_place(self) -> int:
        """Take a free place for the features of a row."""
        return self._places.pop()

    def free_feature_places(self, places: Sequence[int]) -> None:
        self._places.extend(places)

    def free_slots(self, slots: Sequence[int]) -> None:
        self._slots.extend(slots)

    def bind(self, plan: Plan) -> _BoundStep:
        """The denoise engine for steps of the plan's shape; those that were bound first go when there are too many.

        Where steps are padded there are as many shapes as were recorded, and none of them goes.
        """
        if plan.shape not in self._steps:
            if not self._device.pads and len(self._steps) == _MOST_BOUND:
                del self._steps[next(iter(self._steps))]
            self._steps[plan.shape] = self._bind_step(plan)
        return self._steps[plan.shape]

    def step(self, plan: Plan) -> None:
        """Launch one step. Raises EngineError; the state is as before then."""
        bound = self.bind(plan)
        steps = self._streams.steps
        bound.plan.write(plan, steps)
        bound.calls[self._parity].launch()
        for row, place in plan.feature_copies:
            steps.copy(self._made_features, self._features, source_at=row, at=place)
        self._parity ^= 1

    def read(self, slot: int) -> Reading:
        """The lanes [LANES, channels, h, w] of a slot, the last of which is the x0 estimate."""
        return self._streams.steps.read(self._states[self._parity], at=slot)

    def stage(self, slots: Sequence[int]) -> Staged:
        """Copy finished pictures out of the state, for which there must be places; their slots may be freed then."""
        entries = tuple(self._entries.pop() for _ in slots)
        for slot, entry in zip(slots, entries, strict=True):
            self._streams.steps.copy(self._states[self._parity], self._staging, source_at=slot, at=entry)
        return Staged(entries, self._streams.steps.record())

    def decode(self, staged: Staged) -> list[Decoded]:
        """Launch the decoding of staged pictures, a chunk at a time. Raises EngineError."""
        self._streams.departures.follow(staged.there)
        chunk = len(self._decode)
        starts = range(0, len(staged.entries), chunk)
        try:
            return [self._decode_some(staged.entries[start : start + chunk]) for start in starts]
        except EngineError:
            self._streams.departures.record().wait()  # for the chunks before it: their entries are about to be freed
            raise

    def free_entries(self, staged: Staged) -> None:
        """Make room for others, once the pictures have been read, or will not be."""
        self._entries.extend(staged.entries)

    def encode(self, image: Image, noise: Sequence[NoiseGenerator]) -> tuple[Reading, ...]:
        """Launch the encoding of a picture [H, W, 3], with noise of each generator, to latents [1, channels, h, w].

        Raises EngineError.
        """
        return tuple(self._encode_with(image, generator.randn(self.latent_shape)) for generator in noise)

    def warm_up(self) -> None:
        """Encode and decode nobody's pictures, and wait for them. Raises EngineError."""
        blank = np.zeros((self.size.height, self.size.width, 3), np.uint8)
        self._encode_with(blank, np.zeros(self.latent_shape, np.float32)).result()
        for count in range(1, len(self._decode) + 1):
            self._decode_some(range(count)).is_finite.result()

    def _encode_with(self, image: Image, noise: Latents) -> Reading:
        bound, arrivals = self._encode, self._streams.arrivals
        arrivals.write(bound.image, image[None])
        arrivals.write(bound.noise, noise[None])
        bound.call.launch()
        return arrivals.read(bound.latents)

    def _decode_some(self, entries: Sequence[int]) -> Decoded:
        bound, departures = self._decode[len(entries) - 1], self._streams.departures
        departures.write(bound.slot, np.array(entries))
        bound.call.launch()
        return Decoded(departures.read(bound.images), departures.read(bound.is_finite))

    def _bind_step(self, plan: Plan) -> _BoundStep:
        memory = PlanMemory(self._device, plan, self.latent_shape)
        pools = {"context": self._context, "kept": self._kept, "features": self._features}
        if plan.shape.depth == "full":  # then they are made
            shape = (plan.shape.rows, *self._made_features.shape[1:])
            pools["features"] = self._made_features.view(shape, np.float32, offset=0)
        there, back = (
            self._denoise[plan.shape.depth].bind({**memory.buffers, **pools, "state": current, "state_next": following})
            for current, following in (self._states, self._states[::-1])
        )
        return _BoundStep(memory, (there, back))

    def _bind_decode(self, engine: Engine, n: int) -> _BoundDecode:
        purpose = f"pictures of {self.size}"
        slot = self._device.allocate((n,), np.int64, purpose=purpose)
        images = self._device.allocate((n, self.size.height, self.size.width, 3), np.uint8, purpose=purpose)
        sound = self._device.allocate((n,), np.float32, purpose=purpose)
        call = engine.bind({"state": self._staging, "slot": slot, "images": images, "sound": sound})
        return _BoundDecode(slot, images, sound, call)

    def _bind_encode(self, engine: Engine) -> _BoundEncode:
        purpose = f"pictures of {self.size}"
        image = self._device.allocate((1, self.size.height, self.size.width, 3), np.uint8, purpose=purpose)
        noise = self._device.allocate((1, *self.latent_shape), np.float32, purpose=purpose)
        latents = self._device.allocate((1, *self.latent_shape), np.float32, purpose=purpose)
        return _BoundEncode(image, noise, latents, engine.bind({"images": image, "noise": noise, "latents": latents}))


def encoded(reading: Reading) -> Latents:
    """The latents [channels, h, w] that the image encoder made, once they are here. Raises EngineError."""
    latents: Latents = reading.result()[0]
    if not np.isfinite(latents).all():
        raise EngineError("The image encoder made NaN or infinity of a picture: build it in a higher --precision.")
    return latents


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _part(block: Array, like: Array, offset: int) -> Array:
    part: Array = block[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)
    return part
