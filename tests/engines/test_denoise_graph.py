"""The fused step in every backend is the step written out in torch, for any mix of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from engines.base import KEPT, LANES, ON_CPU, TERMS, Array, Engine, open_device
from engines.manifest import Manifest
from tests.tiny import TOKENS, WIDTH

SLOTS, PROMPTS = 6, 5


@pytest.fixture(scope="module", params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(bundle: Path, backend: str) -> Engine:
    manifest = Manifest.load(bundle)
    return open_device(backend, threads=1).load(bundle / manifest.engine(backend, "denoise"))


@pytest.fixture(scope="module")
def unet(checkpoint: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()


def random_plan(
    rng: np.random.Generator, *, images: int, rows: int, h: int, w: int, chunks: int = 1
) -> dict[str, Array]:
    """Any numbers at all: the graph must not care what the server would send. Half of each picture is kept."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "state": normal(SLOTS, LANES, 4, h, w),
        "context": normal(PROMPTS, TOKENS, WIDTH),
        "kept": np.concatenate([normal(SLOTS, KEPT - 1, 4, h, w), normal(SLOTS, 1, 4, h, w) > 0], axis=1),
        "noise": normal(images, 4, h, w),
        "slot": rng.permutation(SLOTS)[:images],
        "row_image": rng.integers(images, size=rows),
        "row_context": rng.integers(PROMPTS, size=(rows, chunks)),
        "timestep": rng.uniform(0, 999, rows).astype(np.float32),
        "guidance": normal(images, rows),
        "scale": rng.uniform(0.1, 1, images).astype(np.float32),
        "coef": normal(images, LANES, TERMS),
        "level": normal(images, 2),
    }


def run(engine: Engine, plan: dict[str, Array]) -> Array:
    device = open_device("onnxruntime", threads=1)
    buffers = {name: device.allocate(array.shape, array.dtype) for name, array in plan.items()}
    for name, array in plan.items():
        buffers[name].write(array)
    buffers["state_next"] = device.allocate(plan["state"].shape, np.float32)
    engine.bind(buffers).run()
    return buffers["state_next"].read()


def reference(unet: Any, plan: dict[str, Array]) -> Array:
    """One step, image by image and lane by lane; only the UNet itself is torch."""
    state = plan["state"].copy()
    outputs = []
    for row, image in enumerate(plan["row_image"]):
        x = plan["state"][plan["slot"][image], 0] * plan["scale"][image]
        context = np.concatenate(plan["context"][plan["row_context"][row]])
        with torch.inference_mode():
            sample = torch.from_numpy(x[None]), torch.tensor([plan["timestep"][row]]), torch.from_numpy(context[None])
            outputs.append(unet(*sample).sample[0].numpy())
    for image, slot in enumerate(plan["slot"]):
        before = plan["state"][slot]
        model = sum(weight * output for weight, output in zip(plan["guidance"][image], outputs, strict=True))
        terms = [before[0], model, plan["noise"][image], *before[1:-1]]
        for lane in range(LANES):
            state[slot, lane] = sum(c * term for c, term in zip(plan["coef"][image, lane], terms, strict=True))
        latents, noise, still = plan["kept"][slot]
        signal, sigma = plan["level"][image]
        state[slot, 0] = np.where(still > 0, signal * latents + sigma * noise, state[slot, 0])
    return state


@pytest.mark.parametrize(("images", "rows"), [(1, 1), (1, 2), (2, 3), (3, 3), (4, 8), (5, 6)])
def test_any_mix_of_rows(engine: Engine, unet: Any, images: int, rows: int) -> None:
    plan = random_plan(np.random.default_rng(rows), images=images, rows=rows, h=16, w=24)
    expected = reference(unet, plan)
    assert np.abs(run(engine, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("chunks", [2, 6])
def test_prompts_of_several_chunks(engine: Engine, unet: Any, chunks: int) -> None:
    plan = random_plan(np.random.default_rng(chunks), images=2, rows=3, h=8, w=8, chunks=chunks)
    expected = reference(unet, plan)
    assert np.abs(run(engine, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_repeated_prompt_is_the_prompt(engine: Engine) -> None:
    """Which lets prompts of different lengths share a step."""
    plan = random_plan(np.random.default_rng(4), images=2, rows=3, h=8, w=8, chunks=2)
    longer = plan | {"row_context": np.tile(plan["row_context"], 3)}
    once, thrice = run(engine, plan), run(engine, longer)
    assert np.abs(once - thrice).max() <= 1e-5 * np.abs(once).max()


def test_nothing_kept_changes_nothing(engine: Engine) -> None:
    plan = random_plan(np.random.default_rng(5), images=2, rows=3, h=8, w=8)
    plan["kept"][:] = 0
    levels = (plan | {"level": level} for level in (plan["level"], 0 * plan["level"]))
    one, other = (run(engine, each) for each in levels)
    assert np.array_equal(one, other)


def test_any_size_that_the_unet_can_halve(engine: Engine, unet: Any) -> None:
    for h, w in [(2, 4), (8, 8), (10, 32)]:
        plan = random_plan(np.random.default_rng(h), images=2, rows=3, h=h, w=w)
        expected = reference(unet, plan)
        assert np.abs(run(engine, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_slots_that_take_no_step_keep_every_bit(engine: Engine) -> None:
    plan = random_plan(np.random.default_rng(0), images=2, rows=4, h=8, w=8)
    after = run(engine, plan)
    resting = [slot for slot in range(SLOTS) if slot not in plan["slot"]]
    assert np.array_equal(after[resting], plan["state"][resting])


def test_padding_to_a_bucket_changes_nothing(engine: Engine) -> None:
    """Spare rows weigh nothing, and spare images write to a slot of their own."""
    plan = random_plan(np.random.default_rng(1), images=2, rows=3, h=8, w=8)
    scratch = next(slot for slot in range(SLOTS) if slot not in plan["slot"])
    padded = random_plan(np.random.default_rng(2), images=4, rows=8, h=8, w=8)
    padded |= {"state": plan["state"], "context": plan["context"], "kept": plan["kept"]}
    padded["slot"][2:] = scratch
    for name in ("noise", "slot", "scale", "coef", "level"):
        padded[name][:2] = plan[name]
    for name in ("row_image", "row_context", "timestep"):
        padded[name][:3] = plan[name]
    padded["guidance"][:] = 0
    padded["guidance"][:2, :3] = plan["guidance"]
    alone, crowded = run(engine, plan), run(engine, padded)
    kept = [slot for slot in range(SLOTS) if slot != scratch]
    assert np.abs(alone[kept] - crowded[kept]).max() <= 1e-4 * np.abs(alone).max()
