"""The fused step in every backend is the step written out in torch, for any mix of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from engines.backends.available import engine_path
from engines.backends.registry import ON_CPU
from engines.contract import INPAINT_LANES, LANES, TERMS, Array
from engines.manifest import Manifest
from tests.support.loaded import Loaded
from tests.support.tiny import TOKENS, WIDTH

SLOTS, PROMPTS, PLACES = 6, 5, 7
CHANNELS = 16  # of features


@pytest.fixture(scope="module", params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def denoise(bundle: Path, backend: str) -> Loaded:
    manifest = Manifest.load(bundle)
    return Loaded(backend, bundle / engine_path(manifest, backend, "denoise"), threads=1)


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
        "inpaint": np.concatenate([normal(SLOTS, INPAINT_LANES - 1, 4, h, w), normal(SLOTS, 1, 4, h, w) > 0], axis=1),
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


def run(denoise: Loaded, plan: dict[str, Array]) -> Array:
    return run_whole(denoise, plan)["state_next"]


def run_whole(denoise: Loaded, plan: dict[str, Array]) -> dict[str, Array]:
    """Features too, which a full step makes."""
    shape = (len(plan["row_image"]), CHANNELS, *plan["state"].shape[3:])
    return denoise(plan, {**like(plan), "features": np.zeros(shape, np.float16)})


def like(plan: dict[str, Array]) -> dict[str, Array]:
    """Outputs of a shallow step."""
    return {"state_next": plan["state"], "guidance_effect": np.zeros(len(plan["slot"]), np.float32)}


def rows_of(unet: Any, plan: dict[str, Array]) -> Iterator[Array]:
    """What the UNet makes of each row, on its own."""
    for row, image in enumerate(plan["row_image"]):
        x = plan["state"][plan["slot"][image], 0] * plan["scale"][image]
        context = np.concatenate(plan["context"][plan["row_context"][row]])
        with torch.inference_mode():
            sample = torch.from_numpy(x[None]), torch.tensor([plan["timestep"][row]]), torch.from_numpy(context[None])
            yield unet(*sample).sample[0].numpy()


def reference(unet: Any, plan: dict[str, Array]) -> Array:
    """One step, image by image and lane by lane; only the UNet itself is torch."""
    return stepped(plan, list(rows_of(unet, plan)))


def stepped(plan: dict[str, Array], outputs: list[Array]) -> Array:
    state = plan["state"].copy()
    for image, slot in enumerate(plan["slot"]):
        before = plan["state"][slot]
        model = sum(weight * output for weight, output in zip(plan["guidance"][image], outputs, strict=True))
        terms = [before[0], model, plan["noise"][image], *before[1:-1]]
        for lane in range(LANES):
            state[slot, lane] = sum(c * term for c, term in zip(plan["coef"][image, lane], terms, strict=True))
        latents, noise, keep_mask = plan["inpaint"][slot]
        signal, sigma = plan["level"][image]
        state[slot, 0] = np.where(keep_mask > 0, signal * latents + sigma * noise, state[slot, 0])
    return state


@pytest.mark.parametrize(("images", "rows"), [(1, 1), (1, 2), (2, 3), (3, 3), (4, 8), (5, 6)])
def test_any_mix_of_rows(denoise: Loaded, unet: Any, images: int, rows: int) -> None:
    plan = random_plan(np.random.default_rng(rows), images=images, rows=rows, h=16, w=24)
    expected = reference(unet, plan)
    assert np.abs(run(denoise, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_it_says_how_much_guidance_adds(denoise: Loaded, unet: Any) -> None:
    """Of an image with a negative row, of one with two, of one without, and of padding."""
    plan = random_plan(np.random.default_rng(12), images=4, rows=6, h=8, w=8)
    plan["row_image"] = np.array([0, 0, 1, 1, 1, 2])
    plan["guidance"] = np.zeros((4, 6), np.float32)
    plan["guidance"][0, :2], plan["guidance"][1, 2:5], plan["guidance"][2, 5] = (7.5, -6.5), (4, -2, -1), 1
    rows = list(rows_of(unet, plan))
    added = [6.5 * (rows[0] - rows[1]), 3 * rows[2] - 2 * rows[3] - rows[4]]
    found = run_whole(denoise, plan)["guidance_effect"]
    np.testing.assert_allclose(found[:2], [np.sqrt(np.square(one).mean()) for one in added], rtol=1e-3)
    assert found[2:].tolist() == [0, 0]


@pytest.mark.parametrize("chunks", [2, 6])
def test_prompts_of_several_chunks(denoise: Loaded, unet: Any, chunks: int) -> None:
    plan = random_plan(np.random.default_rng(chunks), images=2, rows=3, h=8, w=8, chunks=chunks)
    expected = reference(unet, plan)
    assert np.abs(run(denoise, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_repeated_prompt_is_the_prompt(denoise: Loaded) -> None:
    """Which lets prompts of different lengths share a step."""
    plan = random_plan(np.random.default_rng(4), images=2, rows=3, h=8, w=8, chunks=2)
    longer = plan | {"row_context": np.tile(plan["row_context"], 3)}
    once, thrice = run(denoise, plan), run(denoise, longer)
    assert np.abs(once - thrice).max() <= 1e-5 * np.abs(once).max()


def test_nothing_kept_changes_nothing(denoise: Loaded) -> None:
    plan = random_plan(np.random.default_rng(5), images=2, rows=3, h=8, w=8)
    plan["inpaint"][:] = 0
    levels = (plan | {"level": level} for level in (plan["level"], 0 * plan["level"]))
    one, other = (run(denoise, each) for each in levels)
    assert np.array_equal(one, other)


def test_any_size_that_the_unet_can_halve(denoise: Loaded, unet: Any) -> None:
    for h, w in [(2, 4), (8, 8), (10, 32)]:
        plan = random_plan(np.random.default_rng(h), images=2, rows=3, h=h, w=w)
        expected = reference(unet, plan)
        assert np.abs(run(denoise, plan) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_slots_that_take_no_step_keep_every_bit(denoise: Loaded) -> None:
    plan = random_plan(np.random.default_rng(0), images=2, rows=4, h=8, w=8)
    after = run(denoise, plan)
    resting = [slot for slot in range(SLOTS) if slot not in plan["slot"]]
    assert np.array_equal(after[resting], plan["state"][resting])


def test_padding_to_a_bucket_changes_nothing(denoise: Loaded) -> None:
    """Spare rows weigh nothing, and spare images write to a slot of their own."""
    plan = random_plan(np.random.default_rng(1), images=2, rows=3, h=8, w=8)
    scratch = next(slot for slot in range(SLOTS) if slot not in plan["slot"])
    padded = random_plan(np.random.default_rng(2), images=4, rows=8, h=8, w=8)
    padded |= {"state": plan["state"], "context": plan["context"], "inpaint": plan["inpaint"]}
    padded["slot"][2:] = scratch
    for name in ("noise", "slot", "scale", "coef", "level"):
        padded[name][:2] = plan[name]
    for name in ("row_image", "row_context", "timestep"):
        padded[name][:3] = plan[name]
    padded["guidance"][:] = 0
    padded["guidance"][:2, :3] = plan["guidance"]
    alone, crowded = run(denoise, plan), run(denoise, padded)
    kept = [slot for slot in range(SLOTS) if slot != scratch]
    assert np.abs(alone[kept] - crowded[kept]).max() <= 1e-4 * np.abs(alone).max()


def guided_plan(rng: np.random.Generator) -> dict[str, Array]:
    """Three images of two rows each, each row told a chunk of its own or one that only its image's other row is told;
    and a row that pads, which weighs nothing."""
    plan = random_plan(rng, images=3, rows=7, h=8, w=8)
    plan["row_image"] = np.array([0, 0, 1, 1, 2, 2, 0])
    plan["row_context"] = np.array([0, 1, 2, 2, 3, 0, 4])[:, None]
    plan["guidance"] = np.append(np.kron(np.eye(3), [[4, -3]]), np.zeros((3, 1)), axis=1).astype(np.float32)
    return plan


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["state", "context", "noise", "timestep", "coef"])
def test_an_image_breaks_alone(denoise: Loaded, name: str, value: float) -> None:
    """Whatever of it is no number: the others keep every bit, and it does not pass for a picture."""
    plan = guided_plan(np.random.default_rng(6))
    slot = plan["slot"][1]
    entry = {"state": (slot, 0, 0, 3, 3), "context": (2, 5, 5), "noise": (1,), "timestep": (3,), "coef": (1,)}[name]
    broken = {**plan, name: plan[name].copy()}
    broken[name][entry] = value
    alone, beside = run(denoise, plan), run(denoise, broken)
    assert not np.isfinite(beside[slot, 0]).any()
    others = np.arange(SLOTS) != slot
    np.testing.assert_array_equal(beside[others], alone[others])


def test_rows_that_weigh_nothing_break_nothing(denoise: Loaded) -> None:
    plan = guided_plan(np.random.default_rng(7))
    broken = plan | {"context": plan["context"].copy()}
    broken["context"][4] = np.nan
    np.testing.assert_array_equal(run(denoise, broken), run(denoise, plan))


def test_large_numbers_are_numbers(denoise: Loaded) -> None:
    plan = guided_plan(np.random.default_rng(8))
    plan["guidance"] *= 1e30
    assert np.isfinite(run(denoise, plan)).all()


def test_features_are_fp16_within_its_range_and_nan_stays_nan(denoise: Loaded) -> None:
    """Of one image's prompt that is NaN, and one so large that its features leave FP16's range."""
    plan = guided_plan(np.random.default_rng(12))
    plan["context"] = plan["context"].copy()
    plan["context"][2] = np.nan  # the rows 2 and 3
    plan["context"][3] *= 1e9  # the row 4
    features = run_whole(denoise, plan)["features"]
    assert features.dtype == np.float16
    assert np.isnan(features[2:4]).all(axis=(1, 2, 3)).all()
    assert np.isfinite(np.delete(features, (2, 3), axis=0)).all()
    assert np.abs(features[4]).max() == np.finfo(np.float16).max
    assert np.abs(features[[0, 1, 5, 6]]).max() < 1000


# The shallow step


@pytest.fixture(scope="module")
def shallow(bundle: Path, backend: str) -> Loaded:
    return Loaded(backend, bundle / engine_path(Manifest.load(bundle), backend, "denoise_shallow"), threads=1)


def shallow_plan(rng: np.random.Generator, *, images: int, rows: int, h: int, w: int) -> dict[str, Array]:
    features = rng.standard_normal((PLACES, CHANNELS, h, w)).astype(np.float16)
    plan = random_plan(rng, images=images, rows=rows, h=h, w=w)
    return {**plan, "features": features, "row_feature": rng.integers(PLACES, size=rows)}


def shallow_reference(unet: Any, plan: dict[str, Array]) -> Array:
    """The whole UNet, in which the layer before the last is made to return the features of each row."""
    places = iter(plan["row_feature"])

    def replace(_layer: Any, _given: Any, made: Any) -> Any:
        kept = torch.from_numpy(plan["features"][next(places)][None]).float()
        return (kept,) if isinstance(made, tuple) else kept

    hook = unet.up_blocks[-1].attentions[-2].register_forward_hook(replace)
    try:
        return reference(unet, plan)
    finally:
        hook.remove()


@pytest.mark.parametrize(("images", "rows", "h", "w"), [(1, 1, 8, 8), (2, 3, 16, 24), (4, 8, 10, 32)])
def test_a_shallow_step_is_the_unet_over_features_of_another(
    shallow: Loaded, unet: Any, images: int, rows: int, h: int, w: int
) -> None:
    plan = shallow_plan(np.random.default_rng(rows), images=images, rows=rows, h=h, w=w)
    made = shallow(plan, like(plan))["state_next"]
    expected = shallow_reference(unet, plan)
    assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()


def test_over_its_own_features_a_shallow_step_is_the_full_one(denoise: Loaded, shallow: Loaded) -> None:
    plan = random_plan(np.random.default_rng(9), images=3, rows=5, h=8, w=8)
    full = run_whole(denoise, plan)
    plan |= {"features": full["features"], "row_feature": np.arange(5)}
    again = shallow(plan, like(plan))["state_next"]
    assert np.abs(again - full["state_next"]).max() <= 5e-4 * np.abs(again).max()  # the features are FP16


def test_in_a_shallow_step_too_an_image_breaks_alone(shallow: Loaded) -> None:
    plan = {**guided_plan(np.random.default_rng(10)), "row_feature": np.arange(7)}
    plan["features"] = np.random.default_rng(11).standard_normal((PLACES, CHANNELS, 8, 8)).astype(np.float16)
    broken = {**plan, "features": plan["features"].copy()}
    broken["features"][3, 0, 1, 1] = np.nan
    alone, beside = shallow(plan, like(plan))["state_next"], shallow(broken, like(plan))["state_next"]
    slot = plan["slot"][1]
    assert not np.isfinite(beside[slot, 0]).any()
    others = np.arange(SLOTS) != slot
    np.testing.assert_array_equal(beside[others], alone[others])
