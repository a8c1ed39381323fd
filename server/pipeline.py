"""Stable Diffusion over its engines: encode, step, decode. Places requests on the device and builds their plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engines.base import Device, Engine
from engines.manifest import GRAPHS, GraphName, Manifest
from server.noise import NoiseGenerator
from server.plan import Placement, Plan, make_plan
from server.pools import Canvas, Kept, PromptPool
from server.request import Image, Request


class Pipeline:
    """Takes requests in, moves them on step by step, and reads their pictures. For the thread that owns the device."""

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[GraphName, Engine],
        device: Device,
        *,
        on_lookup: Callable[[bool], None] = lambda _found: None,
    ) -> None:
        """`on_lookup` hears of every chunk of a prompt whether its embeddings were still there."""
        rows = manifest.context_rows
        self._prompts = PromptPool(manifest, engines["encode_prompt"], device, rows=rows, on_lookup=on_lookup)
        self._canvases = {
            size: Canvas(size, manifest, engines=engines, device=device, context=self._prompts.context)
            for size in manifest.resolutions
        }
        self._to_rgb = np.array(manifest.preview, np.float32)  # [3, channels + 1]
        self._placements: dict[Request, Placement] = {}

    @classmethod
    def load(
        cls, manifest: Manifest, bundle: Path, *, backend: str, device: Device, on_lookup: Callable[[bool], None]
    ) -> Pipeline:
        """Load the engines of the verified bundle in folder `bundle`. Raises EngineError."""
        engines = {name: device.load(bundle / manifest.engine(backend, name)) for name in GRAPHS}
        return cls(manifest, engines, device, on_lookup=on_lookup)

    def admit(self, request: Request) -> None:
        """Give `request` slots, its prompts' embeddings and its first noise. Raises EngineError and takes nothing."""
        wish = request.wish
        canvas = self._canvases[wish.size]
        noise = tuple(NoiseGenerator(seed) for seed in wish.seeds)
        with ExitStack() as undo:
            rows = []
            # As in diffusers, the negative prompt is read by all layers.
            prompts = [(wish.prompt, wish.clip_skip), (wish.negative_prompt, 0)]
            for prompt, clip_skip in prompts if wish.guided else prompts[:1]:
                rows.append(self._prompts.acquire(prompt, clip_skip=clip_skip))
                undo.callback(self._prompts.release, prompt, clip_skip=clip_skip)
            slots: list[int] = []
            undo.callback(canvas.free_slots, slots)
            for generator in noise:
                slots.append(_begin(canvas, request, generator))
            self._placements[request] = Placement(request, tuple(slots), tuple(rows), noise, undo.pop_all())

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Plan one step of `requests`, which share a size and have been admitted."""
        placements = [self._placements[request] for request in requests]
        return make_plan(placements, self._canvases[requests[0].wish.size].latent_shape)

    def step(self, plan: Plan) -> None:
        """Run `plan` and move its requests on by one step. Raises EngineError; no request has moved then."""
        self._canvases[plan.placements[0].request.wish.size].step(plan)
        for placement in plan.placements:
            placement.request.step += 1

    def decode(self, request: Request) -> tuple[Image, ...]:
        """The pictures of a request whose last step is done. Raises EngineError."""
        canvas = self._canvases[request.wish.size]
        return tuple(canvas.decode(slot) for slot in self._placements[request].slots)

    def preview(self, request: Request) -> Image:
        """The first picture as the model sees it now, a pixel per latent: its x0 estimate, projected to colours."""
        latents = self._canvases[request.wish.size].denoised(self._placements[request].slots[0])
        colours = np.tensordot(self._to_rgb[:, :-1], latents, axes=1) + self._to_rgb[:, -1, None, None]
        image: Image = (np.nan_to_num(colours).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return image

    def release(self, request: Request) -> None:
        """Free what `request` holds on the device; nothing if it was never admitted."""
        if placement := self._placements.pop(request, None):
            placement.hold.close()


def _begin(canvas: Canvas, request: Request, generator: NoiseGenerator) -> int:
    """A slot with the first x of one picture: noise, or the original under noise. Draws in diffusers' order."""
    original, table = request.wish.original, request.table
    if original is None:
        return canvas.take_slot(generator.randn(canvas.latent_shape) * np.float32(table.init_scale), None)
    latents = canvas.encode(original.image, generator.randn(canvas.latent_shape))
    noise = generator.randn(canvas.latent_shape)
    signal, sigma = (0.0, table.init_scale) if original.starts_from_noise else table.steps[0].level
    x = np.float32(signal) * latents + np.float32(sigma) * noise
    if original.mask is None:
        return canvas.take_slot(x, None)
    generator.randn(canvas.latent_shape)  # diffusers encodes the masked picture too, which only other UNets look at
    return canvas.take_slot(x, Kept(latents, noise, original.mask))
