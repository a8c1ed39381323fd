"""Stable Diffusion over its engines: encode, step, decode. Places requests on the device and plans their steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engines.backends.available import engine_path
from engines.backends.device import Device, Engine, Event, Reader, Reading, Stream
from engines.contract import GraphName
from engines.errors import DeviceLost
from engines.manifest import Manifest, Size
from engines.row_buckets import CHUNK_BUCKETS, row_buckets, step_buckets
from server.requests.request import Depth, Image, Request
from server.requests.tokenizer import Prompt
from server.runtime.admission import Admission, DecodeCall, DecodedImage, Finished, PendingDecode, Placement
from server.runtime.decodes import DecodePriority
from server.runtime.latent_pool import LatentPool, Streams, encoded, features_bytes, first_latents
from server.runtime.monitoring.trace import Trace
from server.runtime.noise import NoiseGenerator, StepNoise
from server.runtime.plan import Plan, RowLayout, StepShape, make_plan, step_shape
from server.runtime.prompt_pool import PromptPool
from server.runtime.safety import UNCHECKED, Safety
from server.runtime.step_times import Kind, StepTimeModel

_log = logging.getLogger(__name__)

_CAPTURED_AFTER = 2  # launches of a call: the first is plain, the second is captured
_MEASURED = 4  # steps
_LONG = 0.5  # seconds of a step, after which a device without captured graphs is warm enough
_BRIEF = 0.05  # seconds of a step that is measured twice: allocating memory dominates the first run


class Move(NamedTuple):
    """One request's part in a step."""

    request: Request
    step: int  # UNet calls done when the step has completed
    previews: tuple[Reading, ...]  # the x0 estimate of each image, where this step shows previews


class InFlightStep(NamedTuple):
    """A launched step."""

    plan: Plan
    size: Size
    moves: tuple[Move, ...]
    finished: tuple[Finished, ...]  # requests whose last step it is
    completed: Event

    @property
    def kind(self) -> Kind:
        return self.size, self.plan.shape.depth

    @property
    def key(self) -> tuple[Size, StepShape]:
        """What its duration depends on."""
        return self.size, self.plan.shape


class Pipeline:
    """Admits requests, advances them step by step, and reads their images. For the thread that owns the device.

    What a request holds on the device is an `Owned` object: `admit` returns an `Admission`, `place` makes it a
    `Placement`, the last `step` a `Finished`, `decode` a `PendingDecode`. Its holder releases the latest one. Only
    `warm_up` waits for the device.
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
        decode_chunk: int | None = None,
        safety: Safety = UNCHECKED,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> None:
        """Allocate all memory, over `engines` that were loaded for `streams`; without the shallow step, no step cache.

        At most `decode_chunk` images are decoded in one call: unless given, on a GPU as many as the bundle was built
        for, and on a CPU one, since several would come no faster together. `on_lookup` is called for every chunk of a
        prompt with whether its embeddings were cached. Raises EngineError where the memory is full.
        """
        self._device, self._streams, self._step_times, self._trace = device, streams, step_times, trace
        self._safety = safety
        chunk = min(decode_chunk or (manifest.decode_batch if device.pads else 1), manifest.decode_batch)
        # A full step of guided requests may finish at once. More would only wait: they come faster than the decoder is.
        self._most_staged = max(manifest.max_rows // 2, chunk)
        self._prompts = PromptPool(
            manifest,
            engines["encode_prompt"],
            device,
            stream=streams.encode,
            rows=manifest.context_rows,
            on_lookup=on_lookup,
        )
        made_features = device.allocate((features_bytes(manifest),), np.uint8, purpose="features of steps")
        self._latent_pools = {
            size: LatentPool(
                size,
                manifest,
                engines=engines,
                device=device,
                streams=streams,
                context=self._prompts.context,
                made_features=made_features,
                decode_chunk=chunk,
            )
            for size in manifest.resolutions
        }
        self._built_rows = manifest.rows
        self._embeds_guidance = manifest.embeds_guidance
        self._to_rgb = np.array(manifest.preview, np.float32)  # [3, channels + 1]
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
        decode_chunk: int | None = None,
        decode_priority: DecodePriority = "equal",
        safety: Safety = UNCHECKED,
        step_cache: bool = True,
        read: Reader = Path.read_bytes,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> Pipeline:
        """Load the engines of the verified bundle in folder `bundle`.

        `safety` says whether the bundle's safety checker is among them, `step_cache` whether the shallow step is.
        `read` gives the contents of a file of the bundle.

        Raises:
            EngineError: an engine cannot be loaded, or the memory is full.
        """
        streams = Streams.open(device, decode_priority)
        stream_of: dict[GraphName, Stream] = {
            "denoise": streams.steps,  # the largest first, while it is alone: loading brings its whole file to memory
            "denoise_shallow": streams.steps,
            "encode_prompt": streams.encode,
            "decode": streams.decode,
            "encode_image": streams.encode,
        }
        if not step_cache:
            del stream_of["denoise_shallow"]
        if safety.runs_graph:
            stream_of["safety"] = streams.decode
        engines = {
            name: device.load(bundle / engine_path(manifest, backend, name), stream, read=read)
            for name, stream in stream_of.items()
        }
        return cls(
            manifest,
            engines,
            device,
            streams=streams,
            step_times=step_times,
            trace=trace,
            decode_chunk=decode_chunk,
            safety=safety,
            on_lookup=on_lookup,
        )

    def warm_up(self, on_status: Callable[[str], None]) -> None:
        """Run every graph, as often as it takes to be captured, and measure the steps. Raises EngineError."""
        for size, pool in self._latent_pools.items():
            on_status(f"warming up {size}")
            for depth in pool.depths:  # steps first: an engine's weights are in memory twice while it first runs
                self._warm_up_steps(pool, depth)
            self._step_times.observe_encode_decode(size, self._warm_up_encode_decode(pool))
        self._device.end_warm_up()
        taken = ", ".join(f"{purpose} {size / 2**20:.0f} MiB" for purpose, size in self._device.memory().items())
        _log.info("%s: memory in use: %s", self._device.name, taken)

    def start_trace(self) -> None:
        """Begin the trace: what is done from here on is done for requests."""
        self._trace.start(self._streams.steps)

    def admit(self, request: Request) -> Admission:
        """Launch the encoding of the prompts and the init image of `request`.

        Raises:
            EngineError: and nothing is held, as with any other exception.
        """
        params = request.params
        pool = self._latent_pools[params.size]
        noise = tuple(NoiseGenerator(seed) for seed in params.seeds)
        with ExitStack() as resources, self._trace.device("encode", self._streams.encode, track="encode"):
            rows = []
            # As in diffusers, clip_skip does not apply to the negative prompt.
            prompts = [(params.prompt, params.clip_skip), (params.negative_prompt, 0)]
            for prompt, clip_skip in prompts if params.guided else prompts[:1]:
                rows.append(self._prompts.acquire(prompt, clip_skip=clip_skip))
                resources.callback(self._release_prompt, prompt, clip_skip)
            latents = () if params.init_image is None else pool.encode(params.init_image.image, noise)
            encoded = self._streams.encode.record()
            return Admission(
                request, resources.pop_all(), prompts=tuple(rows), noise=noise, init_latents=latents, encoded=encoded
            )

    def place(self, admission: Admission) -> Placement:
        """Give an admitted request its slots, once what it needs is encoded: before, others would wait for it too.

        The placement takes over what the admission holds.

        Raises:
            EngineError: the init image was not encoded to finite latents; the admission still holds everything.
        """
        request, resources = admission.request, admission.resources
        pool = self._latent_pools[request.params.size]
        slots, places = list[int](), list[int]()
        resources.callback(pool.free_slots, slots)
        resources.callback(pool.free_feature_places, places)
        for index, generator in enumerate(admission.noise):
            latents = encoded(admission.init_latents[index]) if admission.init_latents else None
            slots.append(pool.take_slot(*first_latents(request, pool, generator, latents)))
        if request.params.cache == "fast":
            places.extend(pool.take_feature_place() for _ in range(request.rows))
        rows_per_image = request.rows // request.images
        features = tuple(
            tuple(places[start : start + rows_per_image]) for start in range(0, len(places), rows_per_image)
        )
        noise = StepNoise(admission.noise, pool.latent_shape)
        return Placement(
            request, resources, slots=tuple(slots), prompts=admission.prompts, noise=noise, features=features
        )

    def plan(self, placements: Sequence[Placement]) -> Plan:
        """Plan one step of `placements`, which share a size and the depth of their next step."""
        pool = self._latent_pools[placements[0].request.params.size]
        shape = step_shape(placements)
        if self._device.pads:
            shape = self._padded(shape, placements[0].request)
        return self._make_plan(pool, shape, placements)

    def lacks_staging(self, placements: Sequence[Placement]) -> bool:
        """Whether images have to be decoded before those that the next step of `placements` finishes can be staged."""
        staged = sum([pool.staged for pool in self._latent_pools.values()])
        if not staged:
            return False
        requests = [placement.request for placement in placements]
        finishing = sum([request.images for request in requests if request.step + 1 == request.steps])
        return finishing > 0 and staged + finishing > self._most_staged

    def step(self, plan: Plan) -> InFlightStep:
        """Launch `plan`, and advance its requests by a step. Those that finish are staged for decoding.

        Raises:
            EngineError: and no request has advanced.
        """
        pool = self._pool_of(plan)
        with self._trace.device(f"step, {plan.rows} rows", self._streams.steps, track="steps"):
            pool.step(plan)
        moves = tuple([self._advance(placement, pool) for placement in plan.placements])
        finished = tuple([self._stage(one, pool) for one in plan.placements if one.request.denoised])
        self._last_step = self._streams.steps.record()
        for placement in plan.placements if finished else ():
            if placement.request.denoised:
                placement.release()  # now that it is known which step read its prompts last
        return InFlightStep(plan, pool.size, moves, finished, self._last_step)

    def decode(self, finished: Sequence[Finished], after: Event) -> tuple[PendingDecode, ...]:
        """Launch the decoding of requests that finished in one step, when its event `after` is complete.

        The results take over what the requests hold. Images of several requests share a call. If one cannot be
        launched, only its images are missing, and asking for them raises why. Raises DeviceLost.
        """
        pool = self._latent_pools[finished[0].request.params.size]
        self._streams.decode.follow(after)
        entries = [entry for one in finished for entry in one.entries]
        chunks = (entries[start : start + pool.decode_chunk] for start in range(0, len(entries), pool.decode_chunk))
        images = (DecodedImage(call, index) for call, count in self._decode(pool, chunks) for index in range(count))
        return tuple(
            PendingDecode(
                one.request, one.resources, decoded=tuple(islice(images, len(one.entries))), safety=self._safety
            )
            for one in finished
        )

    def _decode(self, pool: LatentPool, chunks: Iterable[Sequence[int]]) -> Iterator[tuple[DecodeCall, int]]:
        """Launch a call for each chunk of entries; yield it with the number of its images."""
        for entries in chunks:
            try:
                with self._trace.device(f"decode, {len(entries)}", self._streams.decode, track="decode"):
                    call = pool.decode(entries)
            except DeviceLost:
                raise
            except Exception as error:  # whatever it is: the decoder changes nothing that others read
                call = DecodeCall.failed(error)
            yield call, len(entries)

    def to_rgb(self, preview: Reading) -> Image:
        """The x0 estimate of a slot as an image with a pixel per latent: an affine map from its channels to RGB."""
        colours = np.tensordot(self._to_rgb[:, :-1], preview.result(), axes=1) + self._to_rgb[:, -1, None, None]
        image: Image = (np.nan_to_num(colours).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return image

    def _release_prompt(self, prompt: Prompt, clip_skip: int) -> None:
        self._prompts.release(prompt, clip_skip=clip_skip, last_read=self._last_step)

    def _pool_of(self, plan: Plan) -> LatentPool:
        return self._latent_pools[plan.placements[0].request.params.size]

    def _stage(self, placement: Placement, pool: LatentPool) -> Finished:
        """Copy the latents of a finished request out of the state, whose slots may then be freed."""
        entries = pool.stage(placement.slots)
        resources = ExitStack()
        resources.callback(pool.free_entries, entries)
        return Finished(placement.request, resources, entries=entries)

    def _advance(self, placement: Placement, pool: LatentPool) -> Move:
        """Count the launched step, and read the x0 estimates of the images where it shows previews.

        There are none where flagged images are blocked: they would show what is not checked yet.
        """
        request = placement.request
        step = request.advance()
        every = request.params.preview_every
        shown = every and not step % every and not request.denoised and not self._safety.blocks
        return Move(request, step, tuple(map(pool.read_x0, placement.slots)) if shown else ())

    def _padded(self, shape: StepShape, first: Request) -> StepShape:
        """The captured shape that `shape` is padded to; for an isolated request the same one every time."""
        chunks = next(chunks for chunks in CHUNK_BUCKETS if chunks % shape.chunks == 0)
        fitting = [rows for rows in row_buckets(self._built_rows, chunks=chunks) if rows >= shape.rows]
        isolated = first.params.isolated
        rows = fitting[0] if isolated else self._step_times.cheapest((first.params.size, shape.depth), fitting)
        return StepShape(rows, rows, chunks, shape.depth)

    def _warm_up_steps(self, pool: LatentPool, depth: Depth) -> None:
        """Measure steps of `depth`, as far as that is worth the time."""
        for shape in self._warm_up_shapes(depth):
            seconds = self._measure_step(pool, shape)
            if shape.chunks == 1:
                self._step_times.observe((pool.size, depth), shape.rows, seconds)
            if not self._device.pads and seconds > _LONG:
                return

    def _warm_up_shapes(self, depth: Depth) -> Iterator[StepShape]:
        if self._device.pads:
            yield from (StepShape(rows, rows, chunks, depth) for rows, chunks in step_buckets(self._built_rows))
        else:  # the smallest, and the largest, which takes all memory: times in between are interpolated
            extremes = sorted({self._built_rows[0], self._built_rows[-1]})
            yield from (StepShape(max(rows // 2, 1), rows, 1, depth) for rows in extremes)

    def _warm_up_encode_decode(self, pool: LatentPool) -> float:
        """Encode and decode a blank image; returns the seconds of one."""
        for _ in range(_CAPTURED_AFTER + 1 if self._device.pads else 1):
            started = time.perf_counter()
            self._prompts.warm_up()
            pool.warm_up()
        return time.perf_counter() - started

    def _measure_step(self, pool: LatentPool, shape: StepShape) -> float:
        """Take steps without requests; returns the seconds of one."""
        plan = self._make_plan(pool, shape, ())
        if self._device.pads:
            first = self._time_steps(pool, plan, 2 * _CAPTURED_AFTER)  # from each state buffer to the other
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
