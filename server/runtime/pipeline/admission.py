"""What a request owns on the device, from admission to its images. Each stage takes over what the last one held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines import safety
from engines.backends.device import Event, Reading
from engines.contract import Array
from server.requests.errors import BrokenPicture, ContentBlocked
from server.requests.params import Image
from server.requests.request import Completed, Request
from server.runtime.pipeline.lora_pool import NO_RANKS, PlacedLora, Ranks
from server.runtime.pipeline.noise import NoiseGenerator, StepNoise
from server.runtime.pipeline.safety import UNCHECKED, Safety

RowConditioning = tuple[tuple[tuple[int, ...], float], ...]  # the context rows and weight of each UNet row of one image


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """One call of the decoder: images of one request or of several, on their way to the host."""

    images: Reading  # [n, H, W, 3] u8
    is_finite: Reading  # [n] f32; 0 where a value was not finite
    scores: tuple[Reading, Reading] | None = None  # of the safety checker, if it runs, as `engines.safety` takes them
    error: Exception | None = None  # why it was not launched

    @classmethod
    def failed(cls, error: Exception) -> DecodeCall:
        """A call that was not launched: it is done, and asking for its images raises `error`."""
        return cls(_Failed(error), _Failed(error), error=error)

    def done(self) -> bool:
        """Whether everything has arrived. Raises DeviceLost."""
        return (self.scores[-1] if self.scores else self.is_finite).done()

    def wait(self) -> None:
        """Block until everything has arrived. Raises as readings do, and what made the call fail."""
        (self.scores[-1] if self.scores else self.is_finite).result()

    @cached_property
    def pixels(self) -> Array:
        """[n, H, W, 3] u8"""
        return self.images.result()

    @cached_property
    def finite(self) -> Array:
        """[n] bool"""
        finite: Array = self.is_finite.result() == 1  # false for NaN too
        return finite

    @cached_property
    def flags(self) -> tuple[bool, ...]:
        """Which images the safety checker flags; empty where it does not run."""
        if self.scores is None:
            return ()
        concepts, special_care = self.scores
        return safety.flagged(concepts.result(), special_care.result())


@dataclass(frozen=True, slots=True)
class _Failed:
    """The reading of a call that was not launched."""

    error: Exception

    def done(self) -> bool:
        return True

    def result(self) -> Array:
        raise self.error


class DecodedImage(NamedTuple):
    """One image of a decode call."""

    call: DecodeCall
    position: int


class Start(NamedTuple):
    """What one image starts from."""

    noise: NDArray[np.float32]  # [c, h, w]
    image: Reading | None  # latents of the init image [1, c, h, w]
    masked: Reading | None  # likewise of the masked image, for models that inpaint


@dataclass(frozen=True, eq=False)
class Owned:
    """What one request holds on the device at a stage of its life."""

    request: Request
    resources: ExitStack  # gives back slots, places, prompt rows and LoRAs

    def release(self) -> None:
        """Give back everything that is held. A second call does nothing."""
        self.resources.close()


class FeaturePlaces:
    """The places of a request in the pool of features."""

    def __init__(self, by_image: Sequence[Sequence[int]], free: Callable[[Sequence[int]], None]) -> None:
        """`by_image` are the places of each image's rows, none without step cache; `free` takes back what is freed."""
        self.by_image = [list(places) for places in by_image]
        self._free = free

    def free(self, image: int, *, keep: int) -> None:
        """Give back the places of an image but for its first `keep`."""
        places = self.by_image[image]
        self._free(places[keep:])
        del places[keep:]

    def free_all(self) -> None:
        for image in range(len(self.by_image)):
            self.free(image, keep=0)


@dataclass(frozen=True, eq=False)
class Upload(Owned):
    """A request whose LoRAs are being written to the device, part by part."""

    loras: tuple[PlacedLora, ...]


@dataclass(frozen=True, eq=False)
class Admission(Owned):
    """A request whose prompts and init image are being encoded. It has no slots yet, and takes no step."""

    loras: tuple[PlacedLora, ...]
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    starts: tuple[Start, ...]  # of each image
    encoded: Event


@dataclass(frozen=True, eq=False)
class Placement(Owned):
    """A request with slots in the state, which takes steps."""

    slots: tuple[int, ...]  # one per image
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: StepNoise
    features: FeaturePlaces
    ranks: Ranks = NO_RANKS  # of the LoRAs that update the UNet, for each of its rows

    @property
    def conditioning(self) -> tuple[RowConditioning, ...]:
        """For each image, its UNet rows in the next step."""
        is_guided = self.request.is_guided
        return tuple([self._guided if is_guided(image) else self._unguided for image in range(len(self.slots))])

    def drop_unused(self) -> None:
        """Free what images hold for negative rows that they will not have any more."""
        for image, places in enumerate(self.features.by_image):
            if len(places) > 1 and not self.request.will_be_guided(image):
                self.features.free(image, keep=1)

    @cached_property
    def _guided(self) -> RowConditioning:
        """Ho & Salimans (2022), eq. 6."""
        g = self.request.params.guidance_scale
        return (self.prompts[0], g), (self.prompts[1], 1 - g)

    @cached_property
    def _unguided(self) -> RowConditioning:
        return ((self.prompts[0], 1.0),)

    @cached_property
    def is_stochastic(self) -> bool:
        """Whether any step takes fresh noise. Asked before every step, so that others cost next to nothing."""
        return any(step.draws for step in self.request.table.steps)

    @property
    def draws_noise(self) -> bool:
        """Whether there is a next step, and it takes fresh noise."""
        request = self.request
        return self.is_stochastic and not request.denoised and request.table.steps[request.step].draws


@dataclass(frozen=True, eq=False)
class Finished(Owned):
    """A request whose last step is launched and whose latents are staged for decoding."""

    entries: tuple[int, ...]  # of the staging pool, one per image


@dataclass(frozen=True, eq=False)
class PendingDecode(Owned):
    """A request whose images are being decoded and copied to the host. It holds their entries of the staging pool."""

    decoded: tuple[DecodedImage, ...]  # calls are shared with requests that finished in the same step
    safety: Safety = UNCHECKED

    def release(self) -> None:
        """Give back the entries once no call reads them, which the host only waits for if the request has failed."""
        for call, _position in self.decoded:
            if not call.done():
                call.wait()
        super().release()

    def done(self) -> bool:
        """Whether the images have arrived, and are checked. Raises DeviceLost."""
        if not all(call.done() for call, _position in self.decoded):
            return False
        has_failed = any(call.error for call, _position in self.decoded)
        return has_failed or all(verdict.done() for verdict in self._verdicts)

    def completed(self) -> Completed:
        """Return the images, once they are done.

        Raises:
            DeviceLost, BrokenPicture
            ContentBlocked: one is flagged, and such requests are blocked.
            Exception: what made a call fail.
        """
        images, flagged = self.images(), self._flagged()
        if self.safety.blocks and any(flagged):
            raise ContentBlocked.of(tuple(compress(self.request.params.seeds, flagged)))
        return Completed(images, None if self.safety.mode == "off" else flagged)

    def images(self) -> tuple[Image, ...]:
        """Return the images, once they have arrived.

        Raises:
            BrokenPicture: one is not finite; otherwise as `completed`.
        """
        if not all(call.finite[position] for call, position in self.decoded):
            raise BrokenPicture(
                "The model computed NaN or infinity for this image: try another seed or a lower guidance_scale. "
                "If it happens often, build the model with --precision bf16."
            )
        return self._pixels

    @cached_property
    def _pixels(self) -> tuple[Image, ...]:
        return tuple(call.pixels[position] for call, position in self.decoded)

    @cached_property
    def _verdicts(self) -> tuple[Future[bool], ...]:
        """Those of a classifier on the host, which begins as soon as the images have arrived."""
        classify = self.safety.classify
        return tuple(map(classify, self._pixels)) if classify else ()

    def _flagged(self) -> tuple[bool, ...]:
        """Which images are flagged; none of them where nothing checks."""
        if self._verdicts:
            return tuple(verdict.result() for verdict in self._verdicts)
        return tuple(call.flags[position] for call, position in self.decoded if call.scores)
