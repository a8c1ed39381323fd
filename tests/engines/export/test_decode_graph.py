"""Decoding returns which images are finite, in every backend, and one that is not leaves the others as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends.available import engine_path
from engines.backends.registry import ON_CPU
from engines.contract import LANES, Array
from engines.manifest import Manifest
from tests.support.loaded import Loaded

SLOTS, SIDE = 4, 8  # latents
DECODED = np.array([2, 0, 3])


@pytest.fixture(scope="module", params=ON_CPU)
def decode(request: pytest.FixtureRequest, bundle: Path, manifest: Manifest) -> Loaded:
    return Loaded(request.param, bundle / engine_path(manifest, request.param, "decode"), threads=1)


def state() -> Array:
    return np.random.default_rng(0).standard_normal((SLOTS, LANES, 4, SIDE, SIDE), np.float32)


def run(decode: Loaded, state: Array) -> tuple[Array, Array]:
    images, is_finite = np.empty((3, 2 * SIDE, 2 * SIDE, 3), np.uint8), np.empty(3, np.float32)
    made = decode({"state": state, "slot": DECODED}, {"images": images, "is_finite": is_finite})
    return made["images"], made["is_finite"]


def test_images_of_finite_latents_are_finite(decode: Loaded) -> None:
    images, is_finite = run(decode, state())
    assert is_finite.tolist() == [1, 1, 1]
    assert images.std() > 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_an_image_that_is_not_finite_is_marked_and_leaves_the_others(decode: Loaded, value: float) -> None:
    """The last is a number, from which the VAE makes none."""
    latents, broken = state(), state()
    broken[0, 0, 1, 4, 4] = value
    images, is_finite = run(decode, broken)
    assert is_finite.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(images[[0, 2]], run(decode, latents)[0][[0, 2]])


def test_only_x_is_decoded(decode: Loaded) -> None:
    """What else a slot holds may be anything, and so may other slots."""
    latents, others = state(), state()
    others[:, 1:] = np.nan
    others[1] = np.nan
    for made, right in zip(run(decode, others), run(decode, latents), strict=True):
        np.testing.assert_array_equal(made, right)
