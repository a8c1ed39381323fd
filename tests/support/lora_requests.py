"""Requests with LoRAs of random factors, for an executor in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engines.contract import LORA_POOL
from engines.manifest import Manifest
from server.requests.params import Image, Lora, WeightedLora
from server.requests.request import Request
from tests.support.executing import Asked, Running

Chosen = Sequence[tuple[str, float]]  # names and weights

_SPREAD = 0.2  # of the factors: pictures differ, and stay pictures


def random_lora(manifest: Manifest, name: str, ranks: int, *, text: bool = True, unet: bool = True) -> Lora:
    """A LoRA that updates every layer of the parts it has."""
    width = LORA_POOL.shape(manifest.dims(manifest.resolutions[0]))[1]
    values = np.zeros((ranks, width), np.float16)
    generator = np.random.default_rng([ord(letter) for letter in name])
    for layer in manifest.lora_layers:
        if text if layer.part == "text_encoder" else unet:
            for start, size in ((layer.down, layer.inputs), (layer.up, layer.outputs)):
                values[:, start : start + size] = generator.standard_normal((ranks, size)) * _SPREAD
    return Lora(name, f"hash of {name}", values, updates_unet=unet, updates_text_encoder=text)


class LoraCaller:
    """Asks an executor for images with the LoRAs that it knows."""

    def __init__(self, running: Running, loras: Mapping[str, Lora]) -> None:
        self.running, self.loras = running, loras

    def request(self, asked: Asked, chosen: Chosen = (), **fields: Any) -> Request:
        request = self.running.request(asked, **fields)
        loras = tuple(WeightedLora(self.loras[name], weight) for name, weight in chosen)
        request.params = replace(request.params, loras=loras)
        return request

    def ask(self, chosen: Chosen = (), **fields: Any) -> Asked:
        """Submit a request."""
        asked = Asked()
        self.running.batcher.submit(self.request(asked, chosen, **fields))
        return asked

    def ask_together(self, wishes: Sequence[tuple[Chosen, Mapping[str, Any]]]) -> list[Asked]:
        """Submit all of them before the next step."""
        asked = [Asked() for _ in wishes]
        pairs = zip(asked, wishes, strict=True)
        requests = [self.request(one, chosen, **fields) for one, (chosen, fields) in pairs]
        with self.running.batcher._changed:
            for request in requests:
                self.running.batcher.submit(request)
        return asked

    def draw(self, chosen: Chosen = (), **fields: Any) -> tuple[Image, ...]:
        return self.ask(chosen, **fields).images()
