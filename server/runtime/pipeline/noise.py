"""Noise as torch draws it, so that a seed gives the image here that it gives in diffusers (run in float32)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

_idle: list[np.random.RandomState] = []  # for others to seed: that takes a hundredth of the time of making one

BLOCK = 16  # torch's vectorised Box-Muller takes uniforms in blocks: 8 for radii, then 8 for angles


class NoiseGenerator:
    """`torch.Generator("cpu").manual_seed(seed)` as far as float32 `torch.randn` needs it, to 1e-6.

    `seed` is any int >= 0. Only its low 32 bits count, as in torch: 5 and 2**32 + 5 draw the same noise.
    Raises ValueError for a negative one.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed {seed} is negative: choose one from 0 upwards.")
        self._mt19937 = _seeded(seed % 2**32)
        weakref.finalize(self, _idle.append, self._mt19937).atexit = False
        self._spare: float | None = None  # the second normal of a scalar pair, kept for the next odd draw

    def randn(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw standard normals, float32 of `shape`; successive calls continue the stream exactly as torch's do."""
        count = math.prod(shape)
        if count < BLOCK:
            return np.array([self._scalar() for _ in range(count)], np.float32).reshape(shape)
        u = self._uniform(count)
        whole = count - count % BLOCK
        z = np.empty(count, np.float32)
        z[:whole] = _box_muller(u[:whole])
        if whole < count:  # a last partial block is drawn anew, over the final 16 elements
            z[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return z.reshape(shape)

    def _bits(self, count: int) -> NDArray[np.uint32]:
        return self._mt19937.randint(2**32, size=count, dtype=np.uint32)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        """[0, 1) from the low 24 bits of one draw each."""
        return (self._bits(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _scalar(self) -> float:
        """Box & Muller (1958) in double precision, a pair at a time; fewer than 16 normals come this way."""
        if self._spare is not None:
            z, self._spare = self._spare, None
            return z
        high1, low1, high2, low2 = self._bits(4).tolist()
        u1, u2 = ((high << 32 | low) % 2**53 * 2.0**-53 for high, low in ((high1, low1), (high2, low2)))
        r, theta = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        self._spare = r * math.sin(theta)
        return r * math.cos(theta)


class StepNoise:
    """The fresh noise of a request's steps: an array [images, c, h, w] f32 for each that takes some."""

    def __init__(self, generators: Sequence[NoiseGenerator], shape: tuple[int, ...]) -> None:
        """`generators` are one per image; `shape` is [c, h, w]."""
        self._generators = generators
        self._shape = shape
        self.ahead: Future[None] | None = None  # done when the next array is drawn, if that was begun
        self._drawn: NDArray[np.float32] | None = None
        self._error: Exception | None = None

    def draw(self) -> None:
        """Draw the next array, unless it is drawn. What goes wrong is raised by `fetch`, and by every later one."""
        if self._drawn is None and self._error is None:
            try:
                self._drawn = np.stack([generator.randn(self._shape) for generator in self._generators])
            except Exception as error:  # whatever it is: the generators are not where they were
                self._error = error

    def fetch(self) -> None:
        """Return when the next array is drawn, in this thread unless that was begun in another one."""
        if self.ahead:
            self.ahead.result()
            self.ahead = None
        self.draw()
        if self._error:
            raise self._error

    def take(self) -> NDArray[np.float32]:
        """The next array."""
        self.fetch()
        drawn, self._drawn = self._drawn, None
        assert drawn is not None  # noqa: S101 - it was fetched
        return drawn


class NoiseAhead:
    """Draws the noise of coming steps in a thread of its own, beside others: numpy draws without Python's lock."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "noise")

    def begin(self, coming: Sequence[StepNoise]) -> None:
        """Draw the next array of each."""
        drawn = self._thread.submit(_draw_each, coming)
        for noise in coming:
            noise.ahead = drawn

    def close(self) -> None:
        """End the thread, which draws for milliseconds at most."""
        self._thread.shutdown(cancel_futures=True)


def _draw_each(coming: Sequence[StepNoise]) -> None:
    for noise in coming:
        noise.draw()


def _seeded(seed: int) -> np.random.RandomState:
    try:
        twister = _idle.pop()
    except IndexError:
        return np.random.RandomState(seed)
    twister.seed(seed)
    return twister


def _box_muller(u: NDArray[np.float32]) -> NDArray[np.float32]:
    """Box & Muller (1958) over blocks of 16, in float32: cosines fill the first half of a block, sines the second."""
    blocks = u.reshape(-1, 2, BLOCK // 2)
    r, theta = np.sqrt(-2 * np.log(1 - blocks[:, 0])), np.float32(2 * np.pi) * blocks[:, 1]
    z = np.empty_like(blocks)
    z[:, 0], z[:, 1] = r * np.cos(theta), r * np.sin(theta)
    return z.ravel()
