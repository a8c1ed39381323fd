"""Stable Diffusion over its engines: encode, step, decode. Places requests on the device and plans their steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engines.backends.available import engine_path
from engines.backends.device import Device, Engine, Event, Reader, Reading
from engines.contract import LORA_POOL, DecoderName, GraphName
from engines.errors import DeviceLost
from engines.manifest import Manifest, Size
from server.requests.params import Image
from server.requests.request import BatchKey, Request
from server.runtime.batching.step_times import Kind, StepTimeModel, kind_of
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.admission import (
    Admission,
    DecodeCall,
    DecodedImage,
    FeaturePlaces,
    Finished,
    Owned,
    PendingDecode,
    Placement,
    Upload,
)
from server.runtime.pipeline.encoding import Encoding
from server.runtime.pipeline.latent_pool import LatentPool, features_bytes, first_latents
from server.runtime.pipeline.lora_pool import UNWATCHED, LoraPool, LoraWatch, Ranks
from server.runtime.pipeline.noise import StepNoise
from server.runtime.pipeline.pieces import Pieces
from server.runtime.pipeline.plan import Plan, RowLayout, StepShape, make_plan, step_shape
from server.runtime.pipeline.prompt_pool import PromptPool
from server.runtime.pipeline.safety import UNCHECKED, Safety
from server.runtime.pipeline.step_shapes import StepShapes
from server.runtime.pipeline.streams import Streams, streams_of_graphs
from server.runtime.pipeline.warm_up import WarmUp

_log = logging.getLogger(__name__)


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
    guidance: Reading | None  # how much it changes each image of the plan, where a request asks for that
    completed: Event

    @property
    def kind(self) -> Kind:
        return kind_of(self.size, self.plan.shape.depth, loras=bool(self.plan.shape.ranks))

    @property
    def batch_key(self) -> BatchKey:
        return self.plan.placements[0].request.batch_key

    @property
    def key(self) -> tuple[BatchKey, StepShape]:
        """What its duration depends on."""
        return self.batch_key, self.plan.shape


class Pipeline:
    """Admits requests, advances them step by step, and reads their images. For the thread that owns the device.

    What a request holds on the device is an `Owned` object: `admit` returns an `Admission`, or an `Upload` that
    becomes one by `upload`, `place` makes it a `Placement`, the last `step` a `Finished`, `decode` a `PendingDecode`.
    Its holder releases the latest one. Only `warm_up` and `await_encoding` wait for the device.
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
        lora_watch: LoraWatch = UNWATCHED,
    ) -> None:
        """Allocate all memory, over `engines` that were loaded for `streams`; without the shallow step, no step cache.

        At most `decode_chunk` images are decoded in one call: unless given, on a GPU as many as the bundle was built
        for, and on a CPU one, since several would come no faster together. `on_lookup` is called for every chunk of a
        prompt with whether its embeddings were cached, `lora_watch` for LoRAs. Raises EngineError where the memory is
        full.
        """
        self._device, self._streams, self._step_times, self._trace = device, streams, step_times, trace
        self._safety = safety
        chunk = min(decode_chunk or (manifest.decode_batch if device.pads else 1), manifest.decode_batch)
        # A full step of guided requests may finish at once. More would only wait: they come faster than the decoder is.
        self._most_staged = max(manifest.max_rows // 2, chunk)
        self._loras = None
        if "denoise_lora" in engines:
            self._loras = LoraPool(manifest, device, stream=streams.encode, watch=lora_watch)
        self._prompts = PromptPool(
            manifest,
            engines["encode_prompt"],
            device,
            stream=streams.encode,
            rows=manifest.context_rows,
            updated=(engines["encode_prompt_lora"], self._loras.buffer) if self._loras else None,
            on_lookup=on_lookup,
        )
        shared = self._prompts.pools | ({LORA_POOL.name: self._loras.buffer} if self._loras else {})
        made_features = device.allocate((features_bytes(manifest),), np.uint8, purpose="features of steps")
        self._latent_pools = {
            size: LatentPool(
                size,
                manifest,
                engines=engines,
                device=device,
                streams=streams,
                pools=shared,
                made_features=made_features,
                decode_chunk=chunk,
            )
            for size in manifest.resolutions
        }
        self._to_rgb = np.array(manifest.preview, np.float32)  # [3, channels + 1]
        self._layout: RowLayout | None = None  # of the last plan
        self._shapes = StepShapes(manifest, step_times, pads=device.pads, has_loras=self._loras is not None)
        self._encoding = Encoding(
            streams=streams,
            trace=trace,
            pools=self._latent_pools,
            prompts=self._prompts,
            loras=self._loras,
        )

    @classmethod
    def load(  # noqa: PLR0913 - the parts, all by keyword
        cls,
        manifest: Manifest,
        bundle: Path,
        *,
        backend: str,
        device: Device,
        streams: Streams,
        step_times: StepTimeModel,
        trace: Trace,
        decode_chunk: int | None = None,
        safety: Safety = UNCHECKED,
        step_cache: bool = True,
        read: Reader = Path.read_bytes,
        on_lookup: Callable[[bool], None] = lambda _found: None,
        lora_watch: LoraWatch = UNWATCHED,
    ) -> Pieces[Pipeline]:
        """Load the engines of the verified bundle in folder `bundle`, one after the other, and allocate all memory.

        `safety` says whether the bundle's safety checker is among them, `step_cache` whether the shallow step is.
        `read` gives the contents of a file of the bundle.

        Raises:
            EngineError: an engine cannot be loaded, or the memory is full.
        """
        stream_of = streams_of_graphs(manifest, streams, step_cache=step_cache, checks=safety.runs_graph)
        engines: dict[GraphName, Engine] = {}
        for name, stream in stream_of.items():
            engines[name] = device.load(bundle / engine_path(manifest, backend, name), stream, read=read)
            yield
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
            lora_watch=lora_watch,
        )

    def warm_up(self, on_status: Callable[[str], None]) -> Pieces[None]:
        """Run every graph, as often as it takes to be captured, and measure the steps, shape by shape.

        A piece waits for the device, and expects no other work on it. Raises EngineError.
        """
        warm_up = WarmUp(
            streams=self._streams,
            prompts=self._prompts,
            shapes=self._shapes,
            step_times=self._step_times,
            plan=lambda pool, shape: self._make_plan(pool, shape, ()),
            pads=self._device.pads,
        )
        for size, pool in self._latent_pools.items():
            on_status(f"warming up {size}")
            yield from warm_up.run(pool)
        self._device.end_warm_up()
        taken = ", ".join(f"{purpose} {size / 2**20:.0f} MiB" for purpose, size in self._device.memory().items())
        _log.info("%s: memory in use: %s", self._device.name, taken)

    def admit(self, request: Request) -> Upload | Admission:
        """Begin to write the LoRAs of `request`, or if they are there, launch the encoding of its prompts and image.

        Raises:
            EngineError: and nothing is held, as with any other exception.
        """
        return self._encoding.admit(request)

    def upload(self, upload: Upload) -> Upload | Admission:
        """Write the next part of the LoRAs. After the last, the result takes over what `upload` holds.

        Raises:
            EngineError: the upload still holds everything, as with any other exception.
        """
        return self._encoding.advance(upload)

    def await_encoding(self, stage: Upload | Admission) -> None:
        """Block until the device has done what was launched last for it. Raises EngineError."""
        self._encoding.wait(stage)

    def place(self, admission: Admission) -> Placement:
        """Give an admitted request its slots, once what it needs is encoded: before, others would wait for it too.

        The placement takes over what the admission holds.

        Raises:
            EngineError: the init image was not encoded to finite latents; the admission still holds everything.
        """
        request, resources = admission.request, admission.resources
        pool = self._latent_pools[request.params.size]
        slots = list[int]()
        resources.callback(pool.free_slots, slots)
        for start in admission.starts:
            slots.append(pool.take_slot(*first_latents(request, start)))
        rows = request.rows // request.images if request.params.reuses_features else 0
        places = [[pool.take_feature_place() for _ in range(rows)] for _image in slots] if rows else []
        features = FeaturePlaces(places, pool.free_feature_places)
        resources.callback(features.free_all)
        noise = StepNoise(admission.noise, pool.latent_shape)
        return Placement(
            request,
            resources,
            slots=tuple(slots),
            prompts=admission.prompts,
            noise=noise,
            features=features,
            ranks=Ranks.of([placed for placed in admission.loras if placed.lora.updates_unet]),
        )

    def plan(self, placements: Sequence[Placement]) -> Plan:
        """Plan one step of `placements`, which share a size and the depth of their next step."""
        pool = self._latent_pools[placements[0].request.params.size]
        shape = self._shapes.chosen(step_shape(placements), placements[0].request)
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
            guidance = pool.step(plan)
        moves = tuple([self._advance(placement, pool) for placement in plan.placements])
        denoised = [one for one in plan.placements if one.request.denoised]
        # In the order in which they are decoded: what is decoded fast does not wait for the VAE.
        finished = tuple([self._stage(one, pool) for one in sorted(denoised, key=_decoder_of)])
        completed = self._encoding.last_step = self._streams.steps.record()
        for placement in plan.placements if finished else ():
            if placement.request.denoised:
                placement.release()  # now that it is known which step read its prompts last
        return InFlightStep(plan, pool.size, moves, finished, guidance, completed)

    def observe_guidance(self, step: InFlightStep) -> None:
        """Let the requests of a completed step know how much guidance changes their images, if they ask for that.

        Raises DeviceLost.
        """
        if not step.guidance:
            return
        effects = step.guidance.result().tolist()
        for placement, move in zip(step.plan.placements, step.moves, strict=True):
            images = len(placement.slots)
            if not placement.request.denoised:
                placement.request.observe_guidance(move.step - 1, effects[:images])
                placement.drop_unused()
            effects = effects[images:]

    def decode(self, finished: Sequence[Finished], after: Event) -> tuple[PendingDecode, ...]:
        """Launch the decoding of requests that finished in one step, when its event `after` is complete.

        The results take over what the requests hold. Images of several requests that have one decoder share a call. If
        one cannot be launched, only its images are missing, and asking for them raises why. Raises DeviceLost.
        """
        pool = self._latent_pools[finished[0].request.params.size]
        self._streams.decode.follow(after)
        pending = list[PendingDecode]()
        for decoder, group in groupby(finished, _decoder_of):
            together = list(group)
            images = self._decode(pool, [entry for one in together for entry in one.entries], decoder)
            for one in together:
                decoded = tuple(islice(images, len(one.entries)))
                pending.append(PendingDecode(one.request, one.resources, decoded=decoded, safety=self._safety))
        return tuple(pending)

    def _decode(self, pool: LatentPool, entries: Sequence[int], decoder: DecoderName) -> Iterator[DecodedImage]:
        """Launch a call for each chunk of `entries`, when its first image is asked for; yield the images."""
        for start in range(0, len(entries), pool.decode_chunk):
            chunk = entries[start : start + pool.decode_chunk]
            try:
                with self._trace.device(f"decode, {len(chunk)}", self._streams.decode, track="decode"):
                    call = pool.decode(chunk, decoder)
            except DeviceLost:
                raise
            except Exception as error:  # whatever it is: the decoder changes nothing that others read
                call = DecodeCall.failed(error)
            yield from (DecodedImage(call, position) for position in range(len(chunk)))

    def to_rgb(self, preview: Reading) -> Image:
        """The x0 estimate of a slot as an image with a pixel per latent: an affine map from its channels to RGB."""
        colours = np.tensordot(self._to_rgb[:, :-1], preview.result(), axes=1) + self._to_rgb[:, -1, None, None]
        image: Image = (np.nan_to_num(colours).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return image

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
        if not request.denoised:
            placement.drop_unused()
        every = request.params.preview_every
        shown = every and not step % every and not request.denoised and not self._safety.blocks
        return Move(request, step, tuple(map(pool.read_x0, placement.slots)) if shown else ())

    def _make_plan(self, pool: LatentPool, shape: StepShape, placements: Sequence[Placement]) -> Plan:
        plan = make_plan(
            placements,
            pool.latent_shape,
            shape=shape,
            spare=pool.spare,
            before=self._layout,
        )
        self._layout = plan.layout
        return plan


def _decoder_of(owned: Owned) -> DecoderName:
    return owned.request.params.decoder  # fast sorts before vae
