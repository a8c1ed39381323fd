"""The safety checker as a graph decides as diffusers' pipeline does on the same images, whatever their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil

from engines import safety
from engines.backends.available import engine_path
from engines.backends.registry import ON_CPU
from engines.checkpoints.safety_checker import Preprocessing
from engines.contract import Array
from engines.export.safety import Safety
from engines.manifest import Manifest
from tests.support.loaded import Loaded
from tests.support.safety import random_checker

CONCEPTS, SPECIAL_CARE = 17, 3
SIZES = [(32, 32), (48, 32), (32, 64), (384, 256)]  # [H, W]


@pytest.fixture(scope="module", params=ON_CPU)
def graph(request: pytest.FixtureRequest, checked_bundle: Path) -> Loaded:
    path = engine_path(Manifest.load(checked_bundle), request.param, "safety")
    return Loaded(request.param, checked_bundle / path, threads=1)


@pytest.fixture(scope="module")
def checker(checked_checkpoint: Path) -> tuple[Any, Any]:
    return (
        StableDiffusionSafetyChecker.from_pretrained(checked_checkpoint / "safety_checker").eval(),
        CLIPImageProcessorPil.from_pretrained(checked_checkpoint / "feature_extractor"),
    )


def photographs(height: int, width: int, count: int = 12) -> Array:
    """Images [n, H, W, 3] of smooth colours with some grain, of all kinds."""
    dice = np.random.default_rng(0)
    coarse = [PIL.Image.fromarray(dice.integers(0, 256, (3, 4, 3), np.uint8)) for _ in range(count)]
    smooth = np.stack([np.asarray(one.resize((width, height), PIL.Image.Resampling.BICUBIC)) for one in coarse])
    grain = dice.normal(0, 12, smooth.shape)
    return (smooth + grain).clip(0, 255).astype(np.uint8)


def scores(graph: Loaded, images: Array) -> tuple[Array, Array]:
    like = {
        "concepts": np.empty((len(images), CONCEPTS), np.float32),
        "special_care": np.empty((len(images), SPECIAL_CARE), np.float32),
    }
    made = graph({"images": images}, like)
    return made["concepts"], made["special_care"]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_verdicts_are_those_of_diffusers(graph: Loaded, checker: tuple[Any, Any], height: int, width: int) -> None:
    module, extractor = checker
    images = photographs(height, width)
    pixels = extractor([PIL.Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    _, expected = module(clip_input=pixels, images=np.zeros((len(images), 1)))
    with torch.inference_mode():
        embeddings = torch.nn.functional.normalize(module.visual_projection(module.vision_model(pixels).pooler_output))
        similarities = embeddings @ torch.nn.functional.normalize(module.concept_embeds).T
    concepts, special_care = scores(graph, images)
    np.testing.assert_allclose(concepts, similarities - module.concept_embeds_weights.detach(), atol=2e-3)
    sure = np.abs(concepts).min(axis=1) > 3e-3  # of others, a level of a pixel may decide
    assert sure.sum() > len(images) // 2
    assert np.array(safety.flagged(concepts, special_care))[sure].tolist() == np.array(expected)[sure].tolist()


def test_some_images_are_flagged_and_some_are_not(graph: Loaded) -> None:
    verdicts = [flag for size in SIZES for flag in safety.flagged(*scores(graph, photographs(*size)))]
    assert 0.05 < np.mean(verdicts) < 0.95


@pytest.mark.parametrize(("height", "width"), [(48, 32), (64, 64), (224, 224), (776, 512)])
def test_images_are_resized_as_pillow_does(height: int, width: int) -> None:
    preprocessing = Preprocessing(224, 224, (0.48, 0.45, 0.4), (0.26, 0.27, 0.28))
    extractor = CLIPImageProcessorPil(image_mean=preprocessing.mean, image_std=preprocessing.std)
    images = photographs(height, width, count=2)
    expected = extractor([PIL.Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    ours = Safety(random_checker(), preprocessing)._preprocessed(torch.from_numpy(images)).numpy()
    levels = np.abs(ours - expected) * 255 * np.array(preprocessing.std)[:, None, None]
    assert levels.max() < 2.1
    assert (levels > 0.5).mean() < 2e-2


def test_crops_may_be_smaller_than_what_is_resized() -> None:
    preprocessing = Preprocessing(40, 29, (0, 0, 0), (1, 1, 1))
    extractor = CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size=29, image_mean=preprocessing.mean, image_std=preprocessing.std
    )
    images = photographs(64, 96, count=2)
    expected = extractor([PIL.Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"]
    ours = Safety(random_checker(), preprocessing)._preprocessed(torch.from_numpy(images)).numpy()
    assert np.abs(ours - expected).max() < 1.1 / 255
