"""What a request owns on the device, from admission to its images. Each stage takes over what the last one held."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from engines import safety
from engines.backends.device import Event, Reading
from server.requests.errors import BrokenPicture, ContentBlocked
from server.requests.request import Completed, Image, Request
from server.runtime.noise import NoiseGenerator
from server.runtime.safety import UNCHECKED, Safety

RowConditioning = tuple[tuple[tuple[int, ...], float], ...]  # the context rows and weight of each UNet row of one image


@dataclass(frozen=True, slots=True)
class StagedImages:
    """Finished latents in the staging pool, on their way out of the state."""

    entries: tuple[int, ...]  # of the staging pool, one per image
    copied: Event


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """Decoded images on their way to the host."""

    images: Reading  # [n, H, W, 3] u8
    is_finite: Reading  # [n] f32; 0 where a value was not finite
    scores: tuple[Reading, Reading] | None = None  # of the safety checker, if it runs, as `engines.safety` takes them

    def done(self) -> bool:
        """Whether everything has arrived. Raises DeviceLost."""
        return (self.scores[-1] if self.scores else self.is_finite).done()

    def flagged(self) -> tuple[bool, ...]:
        """Which images the safety checker flags; none of them where it does not run."""
        if self.scores is None:
            return ()
        concepts, special_care = self.scores
        return safety.flagged(concepts.result(), special_care.result())


@dataclass(frozen=True, eq=False)
class Owned:
    """What one request holds on the device at a stage of its life."""

    request: Request
    resources: ExitStack  # gives back slots, places and prompt rows

    def release(self) -> None:
        """Give back everything that is held. A second call does nothing."""
        self.resources.close()


@dataclass(frozen=True, eq=False)
class Admission(Owned):
    """A request whose prompts and init image are being encoded. It has no slots yet, and takes no step."""

    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    init_latents: tuple[Reading, ...]  # the encoded init image, sampled for each image; empty without one
    encoded: Event


@dataclass(frozen=True, eq=False)
class Placement(Owned):
    """A request with slots in the state, which takes steps."""

    slots: tuple[int, ...]  # one per image
    prompts: tuple[tuple[int, ...], ...]  # context rows of the prompt's chunks and, if guided, the negative prompt's
    noise: tuple[NoiseGenerator, ...]  # one per image
    features: tuple[tuple[int, ...], ...]  # by image, the feature places of its rows; empty without step cache

    @property
    def conditioning(self) -> RowConditioning:
        """The UNet rows of each image in the next step."""
        return self._guided if self.request.guided[self.request.step] else self._unguided

    @cached_property
    def _guided(self) -> RowConditioning:
        """Ho & Salimans (2022), eq. 6."""
        g = self.request.params.guidance_scale
        return (self.prompts[0], g), (self.prompts[1], 1 - g)

    @cached_property
    def _unguided(self) -> RowConditioning:
        return ((self.prompts[0], 1.0),)

    @property
    def draws_noise(self) -> bool:
        """Whether the next step takes fresh noise."""
        return self.request.table.steps[self.request.step].draws


@dataclass(frozen=True, eq=False)
class Finished(Owned):
    """A request whose last step is launched and whose latents are staged for decoding."""

    staged: StagedImages


@dataclass(frozen=True, eq=False)
class PendingDecode(Owned):
    """A request whose images are being decoded and copied to the host."""

    decoded: Sequence[DecodedImages]
    safety: Safety = UNCHECKED

    def done(self) -> bool:
        """Whether the images have arrived, and are checked. Raises DeviceLost."""
        return self.decoded[-1].done() and all(verdict.done() for verdict in self._verdicts)

    def completed(self) -> Completed:
        """Return the images, once they are done.

        Raises:
            DeviceLost, BrokenPicture
            ContentBlocked: one is flagged, and such requests are blocked.
        """
        images, flagged = self.images(), self._flagged()
        if self.safety.blocks and any(flagged):
            raise ContentBlocked.of(tuple(compress(self.request.params.seeds, flagged)))
        return Completed(images, None if self.safety.mode == "off" else flagged)

    def images(self) -> tuple[Image, ...]:
        """Return the images, once they have arrived. Raises DeviceLost; BrokenPicture for one that is not finite."""
        if not all((chunk.is_finite.result() == 1).all() for chunk in self.decoded):  # NaN counts as true
            raise BrokenPicture(
                "The model computed NaN or infinity for this image: try another seed or a lower guidance_scale. "
                "If it happens often, build the model with --precision bf16."
            )
        return self._pixels

    @cached_property
    def _pixels(self) -> tuple[Image, ...]:
        return tuple(image for chunk in self.decoded for image in chunk.images.result())

    @cached_property
    def _verdicts(self) -> tuple[Future[bool], ...]:
        """Those of a classifier on the host, which begins as soon as the images have arrived."""
        classify = self.safety.classify
        return tuple(map(classify, self._pixels)) if classify else ()

    def _flagged(self) -> tuple[bool, ...]:
        """Which images are flagged; none of them where nothing checks."""
        if self._verdicts:
            return tuple(verdict.result() for verdict in self._verdicts)
        return tuple(flag for chunk in self.decoded for flag in chunk.flagged())
