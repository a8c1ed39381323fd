"""What running requests own on the device: slots in a state pool, and rows of prompt embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.base import LANES, Array, Buffer, Call, Device, Engine
from engines.manifest import GraphName, Manifest, Size
from server.noise import NoiseGenerator
from server.plan import Plan
from server.request import Image
from server.tokenizer import Prompt


@dataclass(frozen=True, slots=True)
class _BoundStep:
    """The denoise engine bound for one count of images and rows: once from each state buffer to the other."""

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
    lane: Buffer
    image: Buffer
    calls: tuple[Call, Call]


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
        self._parity = 0  # which of them is current
        self._denoise = engines["denoise"]
        self._device = device
        self._context = context
        self._steps: dict[tuple[int, int], _BoundStep] = {}
        self._decode = self._bind_decode(engines["decode"], size)

    def take_slot(self, noise: NoiseGenerator, init_scale: float) -> int:
        """Take a free slot and begin its picture with fresh noise."""
        lanes = np.zeros(
            (LANES, *self.latent_shape), np.float32
        )  # a predecessor's NaN would survive a zero coefficient
        lanes[0] = noise.randn(self.latent_shape) * np.float32(init_scale)
        slot = self._slots.pop()
        self._states[self._parity].write(lanes, at=slot)
        return slot

    def free_slots(self, slots: tuple[int, ...]) -> None:
        self._slots.extend(slots)

    def step(self, plan: Plan) -> None:
        """Run one step. Raises EngineError; the state is as before then."""
        key = (plan.images, plan.rows)
        if key not in self._steps:
            self._steps[key] = self._bind_step(plan)
        self._steps[key].run(plan.arrays, self._parity)
        self._parity ^= 1

    def decode(self, slot: int, lane: int) -> Image:
        """The picture [H, W, 3] in one lane of a slot. Raises EngineError."""
        bound = self._decode
        bound.slot.write(np.array([slot]))
        bound.lane.write(np.array([lane]))
        bound.calls[self._parity].run()
        image: Image = bound.image.read()[0]
        return image

    def _bind_step(self, plan: Plan) -> _BoundStep:
        inputs = {name: self._device.allocate(array.shape, array.dtype) for name, array in plan.arrays.items()}
        calls = [
            self._denoise.bind({**inputs, "context": self._context, "state": current, "state_next": following})
            for current, following in (self._states, self._states[::-1])
        ]
        return _BoundStep(inputs, (calls[0], calls[1]))

    def _bind_decode(self, engine: Engine, size: Size) -> _BoundDecode:
        slot, lane = self._device.allocate((1,), np.int64), self._device.allocate((1,), np.int64)
        image = self._device.allocate((1, size.height, size.width, 3), np.uint8)
        calls = [engine.bind({"state": state, "slot": slot, "lane": lane, "images": image}) for state in self._states]
        return _BoundDecode(slot, lane, image, (calls[0], calls[1]))


class PromptPool:
    """Prompt embeddings on the device. Requests with the same prompt share a row, and rows outlive their requests
    until the room is needed: the negative prompt of nearly everyone is encoded once."""

    def __init__(self, manifest: Manifest, engine: Engine, device: Device, *, rows: int) -> None:
        context = manifest.context
        self.context = device.allocate((rows, context.tokens, context.width), np.float32)
        self._ids = device.allocate((1, context.tokens), np.int64)
        self._embeddings = device.allocate((1, context.tokens, context.width), np.float32)
        self._encode = engine.bind({"ids": self._ids, "embeddings": self._embeddings})
        self._free = list(range(rows))
        self._rows: OrderedDict[tuple[int, ...], int] = OrderedDict()  # least recently used first
        self._users: dict[tuple[int, ...], int] = {}

    def acquire(self, prompt: Prompt) -> int:
        """The row that holds the embeddings of `prompt`, until `release`. Raises EngineError."""
        ids = prompt.ids
        if ids not in self._rows:
            self._ids.write(np.array([ids]))
            self._encode.run()
            row = self._free.pop() if self._free else self._evict()
            self.context.copy_from(self._embeddings, at=row)
            self._rows[ids] = row
        self._rows.move_to_end(ids)
        self._users[ids] = self._users.get(ids, 0) + 1
        return self._rows[ids]

    def release(self, prompt: Prompt) -> None:
        self._users[prompt.ids] -= 1
        if not self._users[prompt.ids]:
            del self._users[prompt.ids]

    def _evict(self) -> int:
        unused = next(ids for ids in self._rows if ids not in self._users)
        return self._rows.pop(unused)
