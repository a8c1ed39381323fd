"""Requests' own LoRAs, over real graphs: as diffusers draws with them fused, alone, and in a crowd of other ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.accuracy import psnr
from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.lora.pack import pack_lora
from engines.manifest import Manifest
from server.requests.request import Image, Lora, WeightedLora
from tests.support.executing import Asked, Running
from tests.support.lora_crowd import WrittenLora, fused, write_loras
from tests.support.references import draw, load_pipeline

Chosen = Sequence[tuple[str, float]]  # names and weights
BOTH = [("kohya", 0.8), ("diffusers-unet", -0.6)]
# What a step can be made of, with LoRAs and without; long prompts, guidance that ends, the step cache.
WISHES: list[tuple[Chosen, dict[str, Any]]] = [
    ([("kohya", 1.0)], {"seed": 1, "num_inference_steps": 6, "scheduler": "ddim"}),
    ([], {"seed": 2, "num_inference_steps": 7, "scheduler": "euler_ancestral", "guidance_scale": 3}),
    ([("peft", 0.7)], {"seed": 3, "num_inference_steps": 4, "guidance_scale": 1, "num_images": 2}),
    (BOTH, {"seed": 4, "num_inference_steps": 8, "cache": "fast"}),
    ([], {"seed": 5, "num_inference_steps": 6, "cache": "fast"}),
    ([("early", 1.1)], {"seed": 6, "num_inference_steps": 5, "prompt": "a red cat " * 60}),
    ([("diffusers-old", 1.0)], {"seed": 7, "num_inference_steps": 6, "guidance_end": 0.5}),
    ([("kohya-unet", 1.0)], {"seed": 8, "num_inference_steps": 6, "width": 48, "scheduler": "heun"}),
    ([("kohya", 0.5)], {"seed": 9, "num_inference_steps": 5, "exact": True}),
]


class Drawing:
    """An executor, and LoRAs that requests may have."""

    def __init__(self, running: Running, loras: dict[str, Lora]) -> None:
        self.running, self.loras = running, loras

    def ask(self, chosen: Chosen = (), **fields: Any) -> Asked:
        asked = Asked()
        request = self.running.request(asked, **fields)
        loras = tuple(WeightedLora(self.loras[name], weight) for name, weight in chosen)
        request.params = replace(request.params, loras=loras)
        self.running.batcher.submit(request)
        return asked

    def draw(self, chosen: Chosen = (), **fields: Any) -> tuple[Image, ...]:
        return self.ask(chosen, **fields).images()


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


@pytest.fixture(scope="session")
def written(lora_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, WrittenLora]]:
    folder = tmp_path_factory.mktemp("loras")
    return folder, {lora.name: lora for lora in write_loras(folder, Manifest.read(lora_bundle))}


@pytest.fixture(scope="session")
def loras(written: tuple[Path, dict[str, WrittenLora]], lora_bundle: Path) -> dict[str, Lora]:
    manifest = Manifest.read(lora_bundle)
    return {name: packed(written[0], name, lora, manifest) for name, lora in written[1].items()}


def packed(folder: Path, name: str, lora: WrittenLora, manifest: Manifest) -> Lora:
    path = folder / f"{name}.safetensors" if name != "peft" else folder / "peft" / "adapter_model.safetensors"
    made = pack_lora(path, manifest)
    return Lora(name, made.sha256, made.values, updates_unet=True, updates_text_encoder=lora.updates_text)


@pytest.fixture(scope="module")
def cpu_drawing(lora_bundle: Path, loras: dict[str, Lora]) -> Iterator[Drawing]:
    with Running(lora_bundle, lambda: OnnxRuntimeDevice(threads=1)) as running:
        yield Drawing(running, loras)


@pytest.mark.parametrize("chosen", [[("kohya", 1.0)], BOTH, [("early", 1.0)]])
def test_the_picture_is_diffusers_own_with_the_loras_fused(
    cpu_drawing: Drawing, reference: Any, written: tuple[Path, dict[str, WrittenLora]], chosen: Chosen
) -> None:
    """Measured: 69.8 dB and more; 17 to 21 dB without the LoRAs."""
    fields: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 8, "width": 32, "height": 32}
    (ours,) = cpu_drawing.draw(chosen, seed=4, scheduler="ddim", guidance_scale=7.5, **fields)
    with fused(reference, [(written[1][name], weight) for name, weight in chosen]):
        theirs = draw(reference, scheduler="ddim", seed=4, guidance_scale=7.5, **fields)
    assert psnr(ours, theirs) >= 45
    (plain,) = cpu_drawing.draw(seed=4, scheduler="ddim", guidance_scale=7.5, **fields)
    assert psnr(plain, theirs) < 30, "the LoRAs hardly matter: this proves nothing"


def test_everyone_gets_the_picture_they_would_get_alone(cpu_drawing: Drawing) -> None:
    """Measured: the same bits, on this machine."""
    alone = [cpu_drawing.draw(chosen, **fields) for chosen, fields in WISHES]
    before = cpu_drawing.running.device.launches.copy()
    together = [asked.images() for asked in [cpu_drawing.ask(chosen, **fields) for chosen, fields in WISHES]]
    launched = cpu_drawing.running.device.launches - before
    for solo, crowd in zip(alone, together, strict=True):
        assert all(psnr(one, other) >= 50 for one, other in zip(solo, crowd, strict=True))
    assert launched["denoise_lora"]
    assert launched["denoise_shallow_lora"]
    np.testing.assert_array_equal(together[-1], alone[-1], err_msg="exact")
