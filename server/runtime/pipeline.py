"""Stable Diffusion over its engines: encode, step, decode. Places requests on the device and builds their plans."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engines.backends.available import engine_path
from engines.backends.device import Device, Engine, Event, Reading, Stream
from engines.contract import GraphName
from engines.manifest import Manifest, Size
from server.requests.errors import BrokenPicture
from server.requests.request import DEPTHS, Depth, Image, Request
from server.runtime.latent_pool import Decoded, InpaintLatents, LatentPool, Latents, Staged, Streams, encoded
from server.runtime.noise import NoiseGenerator
from server.runtime.plan import Placement, Plan, RowLayout, StepShape, make_plan, step_shape
from server.runtime.prompt_pool import PromptPool
from server.runtime.step_times import Kind, StepTimeModel
from server.runtime.trace import Trace

_log = logging.getLogger(__name__)

_CHUNK_BUCKETS = (1, 2, 6)  # lengths of prompts that steps of fixed shapes are filled up to; there are 1, 2, 3 and 6
_RECORDED_AFTER = 2  # launches of a call: the first is plain, the second is recorded
_MEASURED = 4  # steps
_LONG = 0.5  # seconds of a step, after which a device that records nothing is warm enough
_BRIEF = 0.05  # seconds of a step that is measured twice: the first run takes the memory, too, which is much beside it


class Move(NamedTuple):
    """One request's part in a flight."""

    request: Request
    step: int  # how many it has done when the flight has landed
    preview: Reading | None


class InFlightStep(NamedTuple):
    """A step on its way."""

    plan: Plan
    size: Size
    moves: tuple[Move, ...]
    landed: Event

    @property
    def kind(self) -> Kind:
        return self.size, self.plan.shape.depth


@dataclass(frozen=True, slots=True)
class PendingDecode:
    """A request's pictures on their way to the host."""

    request: Request
    decoded: Sequence[Decoded]

    def done(self) -> bool:
        """Whether they are here. Raises DeviceLost."""
        return self.decoded[-1].is_finite.done()

    def images(self) -> tuple[Image, ...]:
        """The pictures, once they are here. Raises DeviceLost, and BrokenPicture for one that is not sound."""
        if not all(chunk.is_finite.result().all() for chunk in self.decoded):
            raise BrokenPicture(
                "The model's numbers went beyond their range (NaN or infinity) in this picture: try another seed or a "
                "lower guidance_scale. If it happens often, build the model with --precision bf16."
            )
        return tuple(image for chunk in self.decoded for image in chunk.images.result())


@dataclass(frozen=True, slots=True)
class _Newcomer:
    """A request that has no slots yet."""

    prompts: tuple[tuple[int, ...], ...]
    noise: tuple[NoiseGenerator, ...]
    latents: tuple[Reading, ...]  # of the picture it starts from, sampled for each image
    encoded: Event  # all that it brings
    hold: ExitStack


class Pipeline:
    """Takes requests in, moves them on step by step, and reads their pictures. For the thread that owns the device.

    Only `warm_up` and `wait_for` wait for the device.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        manifest: Manifest,
        engines: Mapping[GraphName, Engine],
        device: Device,
        *,
        streams: Streams,
        step_times: StepTimeModel,
        trace: Trace,
        decode_chunk: int = 1,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> None:
        """Take all memory, over `engines` that were loaded for `streams`.

        At most `decode_chunk` pictures are decoded in one call. `on_lookup` hears of every chunk of a prompt whether
        its embeddings were still there. Raises EngineError where the memory is full.
        """
        self._device, self._streams, self._step_times, self._trace = device, streams, step_times, trace
        self._prompts = PromptPool(
            manifest,
            engines["encode_prompt"],
            device,
            stream=streams.arrivals,
            rows=manifest.context_rows,
            on_lookup=on_lookup,
        )
        self._latent_pools = {
            size: LatentPool(
                size,
                manifest,
                engines=engines,
                device=device,
                streams=streams,
                context=self._prompts.context,
                decode_chunk=min(decode_chunk, manifest.decode_batch),
            )
            for size in manifest.resolutions
        }
        self._buckets = manifest.rows
        self._embeds_guidance = manifest.embeds_guidance
        self._to_rgb = np.array(manifest.preview, np.float32)  # [3, channels + 1]
        self._newcomers: dict[Request, _Newcomer] = {}
        self._placements: dict[Request, Placement] = {}
        self._staged: dict[Request, Staged] = {}
        self._last_step: Event | None = None
        self._layout: RowLayout | None = None  # of the last plan

    @classmethod
    def load(  # noqa: PLR0913 - the parts, all by keyword
        cls,
        manifest: Manifest,
        bundle: Path,
        *,
        backend: str,
        device: Device,
        step_times: StepTimeModel,
        trace: Trace,
        decode_chunk: int = 1,
        decode_beside: bool = True,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> Pipeline:
        """Load the engines of the verified bundle in folder `bundle`; decode beside the steps, or between them.

        Raises:
            EngineError: an engine cannot be loaded, or the memory is full.
        """
        steps = device.stream("steps", urgent=True)
        streams = Streams(
            arrivals=device.stream("arrivals"),
            steps=steps,
            departures=device.stream("departures") if decode_beside else steps,
        )
        homes: dict[GraphName, Stream] = {
            "denoise": streams.steps,  # the largest first, while it is alone: loading brings its whole file to memory
            "denoise_shallow": streams.steps,
            "encode_prompt": streams.arrivals,
            "decode": streams.departures,
            "encode_image": streams.arrivals,
        }
        engines = {
            name: device.load(bundle / engine_path(manifest, backend, name), home) for name, home in homes.items()
        }
        return cls(
            manifest,
            engines,
            device,
            streams=streams,
            step_times=step_times,
            trace=trace,
            decode_chunk=decode_chunk,
            on_lookup=on_lookup,
        )

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """Run everything, as often as it takes to be recorded, and measure the steps. Raises EngineError."""
        for size, pool in self._latent_pools.items():
            tell(f"warming up {size}")
            for depth in DEPTHS:  # steps first: an engine's weights are in memory twice while it first runs
                self._rehearse_steps(pool, depth)
            self._step_times.observe_ends(size, self._rehearse_ends(pool))
        self._device.end_warm_up()
        taken = ", ".join(f"{purpose} {size / 2**20:.0f} MiB" for purpose, size in self._device.memory().items())
        _log.info("%s holds %s", self._device.name, taken)
        self._trace.start(self._streams.steps)

    def admit(self, request: Request) -> None:
        """Begin to encode what `request` brings: its prompts, and the picture it starts from.

        Raises:
            EngineError: and it holds nothing.
        """
        params = request.params
        pool = self._latent_pools[params.size]
        noise = tuple(NoiseGenerator(seed) for seed in params.seeds)
        with ExitStack() as undo, self._trace.device("encode", self._streams.arrivals, lane="arrivals"):
            rows = []
            # As in diffusers, the negative prompt is read by all layers.
            prompts = [(params.prompt, params.clip_skip), (params.negative_prompt, 0)]
            for prompt, clip_skip in prompts if params.guided else prompts[:1]:
                rows.append(self._prompts.acquire(prompt, clip_skip=clip_skip, after=self._last_step))
                undo.callback(self._prompts.release, prompt, clip_skip=clip_skip)
            latents = () if params.init_image is None else pool.encode(params.init_image.image, noise)
            self._newcomers[request] = _Newcomer(
                tuple(rows), noise, latents, self._streams.arrivals.record(), undo.pop_all()
            )

    def arrived(self, request: Request) -> bool:
        """Whether `request` may take a step; once what it brings is encoded, it is given its slots.

        Until then others go on: were their next step to wait for it on the device, they would wait with it.

        Raises:
            EngineError: that picture cannot be started from.
        """
        if newcomer := self._newcomers.get(request):
            if not newcomer.encoded.done():
                return False
            self._placements[request] = self._place(request, newcomer)
            del self._newcomers[request]
        return True

    def wait_for(self, request: Request) -> None:
        """Wait for what `arrived` asks of the device. Raises DeviceLost."""
        self._newcomers[request].encoded.wait()

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Plan one step of `requests`, which share a size and have arrived."""
        placements = [self._placements[request] for request in requests]
        pool = self._latent_pools[requests[0].params.size]
        shape = step_shape(placements)
        if self._device.pads:
            shape = self._filled_up(shape, requests)
        return self._make_plan(pool, shape, placements)

    def crowded(self, plan: Plan) -> bool:
        """Whether pictures have to leave before those that this step would finish can be staged."""
        return sum(request.images for request in plan.finishing) > self._latent_pool(plan).staging_places

    def step(self, plan: Plan) -> InFlightStep:
        """Launch `plan`. Its requests have moved on by a step, and the finished are on their way out.

        Raises:
            EngineError: and no request has moved.
        """
        pool = self._latent_pool(plan)
        with self._trace.device(f"step, {plan.rows} rows", self._streams.steps, lane="steps"):
            pool.step(plan)
        moves = tuple([self._move(placement, pool) for placement in plan.placements])
        for request in plan.finishing:
            self._stage(request, pool)
        self._last_step = self._streams.steps.record()
        return InFlightStep(plan, pool.size, moves, self._last_step)

    def decode(self, request: Request) -> PendingDecode:
        """Launch the decoding of a request whose last step has been launched. Raises EngineError."""
        pool, staged = self._latent_pools[request.params.size], self._staged[request]
        with self._trace.device(f"decode, {request.images}", self._streams.departures, lane="departures"):
            return PendingDecode(request, pool.decode(staged))

    def colours(self, preview: Reading) -> Image:
        """A picture as the model sees it now, a pixel per latent: its x0 estimate, projected to colours."""
        latents = preview.result()[-1]
        colours = np.tensordot(self._to_rgb[:, :-1], latents, axes=1) + self._to_rgb[:, -1, None, None]
        image: Image = (np.nan_to_num(colours).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return image

    def release(self, request: Request) -> None:
        """Free what `request` holds on the device; nothing if it was never admitted."""
        if placed := self._newcomers.pop(request, None) or self._placements.pop(request, None):
            placed.hold.close()
        if staged := self._staged.pop(request, None):
            self._latent_pools[request.params.size].free_entries(staged)

    def _latent_pool(self, plan: Plan) -> LatentPool:
        return self._latent_pools[plan.placements[0].request.params.size]

    def _place(self, request: Request, newcomer: _Newcomer) -> Placement:
        pool = self._latent_pools[request.params.size]
        slots, places = list[int](), list[int]()
        newcomer.hold.callback(pool.free_slots, slots)
        newcomer.hold.callback(pool.free_feature_places, places)
        for index, generator in enumerate(newcomer.noise):
            latents = encoded(newcomer.latents[index]) if newcomer.latents else None
            slots.append(pool.take_slot(*_beginning(request, pool, generator, latents)))
        if request.params.cache == "fast":
            places.extend(pool.take_feature_place() for _ in range(request.rows))
        lanes = request.rows // request.images
        features = tuple(tuple(places[start : start + lanes]) for start in range(0, len(places), lanes))
        return Placement(request, tuple(slots), newcomer.prompts, newcomer.noise, features, newcomer.hold)

    def _stage(self, request: Request, pool: LatentPool) -> None:
        placement = self._placements.pop(request)
        self._staged[request] = pool.stage(placement.slots)
        placement.hold.close()

    def _move(self, placement: Placement, pool: LatentPool) -> Move:
        """One more step is launched. After some, a request shows its first picture: the lanes of it are read."""
        request = placement.request
        request.step = step = request.step + 1
        every = request.params.preview_every
        shown = every and not step % every and not request.denoised
        return Move(request, step, pool.read(placement.slots[0]) if shown else None)

    def _filled_up(self, shape: StepShape, requests: Sequence[Request]) -> StepShape:
        """The shape that engines were recorded for. Who shares with nobody is given the same one every time."""
        fitting = [rows for rows in self._buckets if rows >= shape.rows]
        exact = requests[0].params.exact
        rows = fitting[0] if exact else self._step_times.cheapest((requests[0].params.size, shape.depth), fitting)
        chunks = next(chunks for chunks in _CHUNK_BUCKETS if chunks % shape.chunks == 0)
        return StepShape(rows, rows, chunks, shape.depth)

    def _rehearse_steps(self, pool: LatentPool, depth: Depth) -> None:
        """Learn how long steps of `depth` take, as far as that is worth the time."""
        for shape in self._rehearsals(depth):
            seconds = self._rehearse(pool, shape)
            if shape.chunks == 1:
                self._step_times.observe((pool.size, depth), shape.rows, seconds)
            if not self._device.pads and seconds > _LONG:
                return

    def _rehearsals(self, depth: Depth) -> Iterator[StepShape]:
        if self._device.pads:
            yield from (StepShape(rows, rows, chunks, depth) for rows in self._buckets for chunks in _CHUNK_BUCKETS)
        else:  # the smallest, and the largest, which takes all memory: between them steps take what a line says
            extremes = sorted({self._buckets[0], self._buckets[-1]})
            yield from (StepShape(max(rows // 2, 1), rows, 1, depth) for rows in extremes)

    def _rehearse_ends(self, pool: LatentPool) -> float:
        """Encode and decode nobody's pictures; returns the seconds of one."""
        for _ in range(_RECORDED_AFTER + 1 if self._device.pads else 1):
            started = time.perf_counter()
            self._prompts.warm_up()
            pool.warm_up()
        return time.perf_counter() - started

    def _rehearse(self, pool: LatentPool, shape: StepShape) -> float:
        """Step nobody's pictures; returns the seconds of a step."""
        plan = self._make_plan(pool, shape, ())
        if self._device.pads:
            first = self._time_steps(pool, plan, 2 * _RECORDED_AFTER)  # from each state buffer to the other
            return self._time_steps(pool, plan, _MEASURED) if shape.chunks == 1 else first
        first = self._time_steps(pool, plan, 1)
        return first if first > _BRIEF else self._time_steps(pool, plan, 1)

    def _time_steps(self, pool: LatentPool, plan: Plan, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            pool.step(plan)
        self._streams.steps.record().wait()
        return (time.perf_counter() - started) / steps

    def _make_plan(self, pool: LatentPool, shape: StepShape, placements: Sequence[Placement]) -> Plan:
        plan = make_plan(
            placements,
            pool.latent_shape,
            shape=shape,
            spare=pool.spare,
            embeds_guidance=self._embeds_guidance,
            before=self._layout,
        )
        self._layout = plan.layout
        return plan


def _beginning(
    request: Request, pool: LatentPool, generator: NoiseGenerator, latents: Latents | None
) -> tuple[Latents, InpaintLatents | None]:
    """The first x of one picture, noise or the original under noise, and what is kept. Draws in diffusers' order."""
    init_image, table = request.params.init_image, request.table
    noise = generator.randn(pool.latent_shape)
    if init_image is None or latents is None:
        return noise * np.float32(table.init_scale), None
    signal, sigma = (0.0, table.init_scale) if init_image.starts_from_noise else table.steps[0].level
    x = np.float32(signal) * latents + np.float32(sigma) * noise
    if init_image.mask is None:
        return x, None
    generator.randn(pool.latent_shape)  # diffusers encodes the masked picture too, which only other UNets look at
    return x, InpaintLatents(latents, noise, init_image.mask)
