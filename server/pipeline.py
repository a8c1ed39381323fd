"""Stable Diffusion over its engines: encode, step, decode. Places requests on the device and builds their plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from engines.base import LANES, Device, Engine
from engines.manifest import GraphName, Manifest
from server.noise import NoiseGenerator
from server.plan import Placement, Plan, make_plan
from server.pools import Canvas, PromptPool
from server.request import Image, Request

_X, _DENOISED = 0, LANES - 1
_USED: tuple[GraphName, ...] = ("encode_prompt", "denoise", "decode")


class Pipeline:
    """Takes requests in, moves them on step by step, and reads their pictures. For the thread that owns the device."""

    def __init__(self, manifest: Manifest, engines: Mapping[GraphName, Engine], device: Device) -> None:
        self._prompts = PromptPool(manifest, engines["encode_prompt"], device, rows=manifest.context_rows)
        self._canvases = {
            size: Canvas(size, manifest, engines=engines, device=device, context=self._prompts.context)
            for size in manifest.resolutions
        }
        self._placements: dict[Request, Placement] = {}

    @classmethod
    def load(cls, manifest: Manifest, bundle: Path, *, backend: str, device: Device) -> Pipeline:
        """Load the engines of the verified bundle in folder `bundle`. Raises EngineError."""
        engines = {name: device.load(bundle / manifest.engine(backend, name)) for name in _USED}
        return cls(manifest, engines, device)

    def admit(self, request: Request) -> None:
        """Give `request` slots, its prompts' embeddings and its first noise. Raises EngineError and takes nothing."""
        wish = request.wish
        canvas = self._canvases[wish.size]
        noise = tuple(NoiseGenerator(seed) for seed in wish.seeds)
        with ExitStack() as undo:
            prompts = [wish.prompt, wish.negative_prompt] if wish.guided else [wish.prompt]
            rows = []
            for prompt in prompts:
                rows.append(self._prompts.acquire(prompt))
                undo.callback(self._prompts.release, prompt)
            slots = tuple(canvas.take_slot(generator, request.table.init_scale) for generator in noise)
            undo.callback(canvas.free_slots, slots)
            self._placements[request] = Placement(request, slots, tuple(rows), noise, undo.pop_all())

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
        return tuple(canvas.decode(slot, _X) for slot in self._placements[request].slots)

    def preview(self, request: Request) -> Image:
        """The first picture as the model sees it now: its x0 estimate, decoded. Raises EngineError."""
        return self._canvases[request.wish.size].decode(self._placements[request].slots[0], _DENOISED)

    def release(self, request: Request) -> None:
        """Free what `request` holds on the device; nothing if it was never admitted."""
        if placement := self._placements.pop(request, None):
            placement.hold.close()
