"""What running requests own on the device: slots in a state pool, and rows of prompt embeddings."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.base import KEPT, LANES, Array, Buffer, Call, Device, Engine, EngineError
from engines.manifest import GraphName, Manifest, Size
from server.plan import Plan
from server.request import Image, Mask
from server.tokenizer import Chunk, Prompt

Latents = NDArray[np.float32]  # [channels, h, w]

_MOST_BOUND = 64  # bound steps of one size; each holds a plan's buffers, up to a megabyte


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps of a picture."""

    latents: Latents
    noise: Latents  # what is laid over them to bring them to a step's noise level
    mask: Mask


@dataclass(frozen=True, slots=True)
class _BoundStep:
    """The denoise engine bound for one count of images, rows and chunks: once from each state buffer to the other."""

    plan: Mapping[str, Buffer]
    calls: tuple[Call, Call]

    def run(self, arrays: Mapping[str, Array], parity: int) -> None:
        for name, array in arrays.items():
            self.plan[name].write(array)
        self.calls[parity].run()


@dataclass(frozen=True, slots=True)
class _BoundDecode:
    """The decode engine bound for one image: once to each state buffer."""

    slot: Buffer
    image: Buffer
    calls: tuple[Call, Call]


@dataclass(frozen=True, slots=True)
class _BoundEncode:
    """The image encoder bound for one image."""

    image: Buffer
    noise: Buffer
    latents: Buffer
    call: Call


class Canvas:
    """The state pool of one picture size: two buffers, of which a step reads one and writes the other."""

    def __init__(
        self, size: Size, manifest: Manifest, *, engines: Mapping[GraphName, Engine], device: Device, context: Buffer
    ) -> None:
        latent = manifest.latent
        self.latent_shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        self._slots = list(range(manifest.max_rows))  # the last of the pool is for rows that only pad
        shape = (manifest.slots, LANES, *self.latent_shape)
        self._states = (device.allocate(shape, np.float32), device.allocate(shape, np.float32))
        self._kept = device.allocate((manifest.slots, KEPT, *self.latent_shape), np.float32)
        self._parity = 0  # which of them is current
        self._denoise = engines["denoise"]
        self._device = device
        self._context = context
        self._steps: dict[tuple[int, int, int], _BoundStep] = {}
        self._decode = self._bind_decode(engines["decode"], size)
        self._encode = self._bind_encode(engines["encode_image"], size)

    def take_slot(self, x: Latents, kept: Kept | None) -> int:
        """Take a free slot and begin its picture with `x`, of which inpainting is to keep a part."""
        # All of it is written: a predecessor's NaN would survive a zero coefficient.
        lanes = np.zeros((LANES, *self.latent_shape), np.float32)
        lanes[0] = x
        still = np.zeros((KEPT, *self.latent_shape), np.float32)
        if kept:
            still[:] = kept.latents, kept.noise, np.broadcast_to(1 - kept.mask, self.latent_shape)
        slot = self._slots.pop()
        self._states[self._parity].write(lanes, at=slot)
        self._kept.write(still, at=slot)
        return slot

    def free_slots(self, slots: Sequence[int]) -> None:
        self._slots.extend(slots)

    def step(self, plan: Plan) -> None:
        """Run one step. Raises EngineError; the state is as before then."""
        key = (plan.images, plan.rows, plan.chunks)
        if key not in self._steps:
            if len(self._steps) == _MOST_BOUND:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = self._bind_step(plan)
        self._steps[key].run(plan.arrays, self._parity)
        self._parity ^= 1

    def decode(self, slot: int) -> Image:
        """The picture [H, W, 3] in a slot. Raises EngineError."""
        bound = self._decode
        bound.slot.write(np.array([slot]))
        bound.calls[self._parity].run()
        image: Image = bound.image.read()[0]
        return image

    def denoised(self, slot: int) -> Latents:
        """The x0 estimate [channels, h, w] of a slot."""
        estimate: Latents = self._states[self._parity].read(at=slot)[-1]
        return estimate

    def encode(self, image: Image, noise: Latents) -> Latents:
        """The latents of a picture [H, W, 3]. Raises EngineError."""
        bound = self._encode
        bound.image.write(image[None])
        bound.noise.write(noise[None])
        bound.call.run()
        latents: Latents = bound.latents.read()[0]
        if not np.isfinite(latents).all():
            raise EngineError("The image encoder made NaN or infinity of a picture: build it in a higher --precision.")
        return latents

    def _bind_step(self, plan: Plan) -> _BoundStep:
        inputs = {name: self._device.allocate(array.shape, array.dtype) for name, array in plan.arrays.items()}
        pools = {"context": self._context, "kept": self._kept}
        calls = [
            self._denoise.bind({**inputs, **pools, "state": current, "state_next": following})
            for current, following in (self._states, self._states[::-1])
        ]
        return _BoundStep(inputs, (calls[0], calls[1]))

    def _bind_decode(self, engine: Engine, size: Size) -> _BoundDecode:
        slot = self._device.allocate((1,), np.int64)
        image = self._device.allocate((1, size.height, size.width, 3), np.uint8)
        calls = [engine.bind({"state": state, "slot": slot, "images": image}) for state in self._states]
        return _BoundDecode(slot, image, (calls[0], calls[1]))

    def _bind_encode(self, engine: Engine, size: Size) -> _BoundEncode:
        image = self._device.allocate((1, size.height, size.width, 3), np.uint8)
        noise = self._device.allocate((1, *self.latent_shape), np.float32)
        latents = self._device.allocate((1, *self.latent_shape), np.float32)
        return _BoundEncode(image, noise, latents, engine.bind({"images": image, "noise": noise, "latents": latents}))


_Key = tuple[Chunk, int]  # and how many of the text encoder's layers are left out


class PromptPool:
    """Embeddings of prompts' chunks on the device. Who is told the same shares a row, and rows outlive their requests
    until the room is needed: the negative prompt of nearly everyone is encoded once."""

    def __init__(
        self, manifest: Manifest, engine: Engine, device: Device, *, rows: int, on_lookup: Callable[[bool], None]
    ) -> None:
        context = manifest.context
        self.context = device.allocate((rows, context.tokens, context.width), np.float32)
        self._layers = context.layers
        self._ids = device.allocate((1, context.tokens), np.int64)
        self._layer = device.allocate((1,), np.int64)
        self._weights = device.allocate((1, context.tokens), np.float32)
        self._embeddings = device.allocate((1, context.tokens, context.width), np.float32)
        buffers = {"ids": self._ids, "layer": self._layer, "weights": self._weights, "embeddings": self._embeddings}
        self._encode = engine.bind(buffers)
        self._on_lookup = on_lookup
        self._free = list(range(rows))
        self._rows: OrderedDict[_Key, int] = OrderedDict()  # least recently used first
        self._users: Counter[_Key] = Counter()

    def acquire(self, prompt: Prompt, *, clip_skip: int = 0) -> tuple[int, ...]:
        """The rows that hold the embeddings of the prompt's chunks, until `release`.

        Raises EngineError, and holds nothing then.
        """
        held: list[_Key] = []
        try:
            for chunk in prompt.chunks:
                self._hold((chunk, clip_skip))
                held.append((chunk, clip_skip))
        except EngineError:
            self._let_go(held)
            raise
        return tuple(self._rows[key] for key in held)

    def release(self, prompt: Prompt, *, clip_skip: int = 0) -> None:
        self._let_go([(chunk, clip_skip) for chunk in prompt.chunks])

    def _hold(self, key: _Key) -> None:
        self._on_lookup(key in self._rows)
        if key not in self._rows:
            self._rows[key] = self._encoded(*key)
        self._rows.move_to_end(key)
        self._users[key] += 1

    def _let_go(self, keys: list[_Key]) -> None:
        self._users -= Counter(keys)  # forgets those that reach zero

    def _encoded(self, chunk: Chunk, clip_skip: int) -> int:
        self._ids.write(np.array([chunk.ids]))
        self._layer.write(np.array([self._layers - clip_skip]))
        self._weights.write(np.array([chunk.weights], np.float32))
        self._encode.run()
        row = self._free.pop() if self._free else self._evict()
        self.context.copy_from(self._embeddings, at=row)
        return row

    def _evict(self) -> int:
        unused = next(key for key in self._rows if key not in self._users)
        return self._rows.pop(unused)
