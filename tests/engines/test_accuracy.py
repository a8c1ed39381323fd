"""The figures of differences are Polygraphy's, and values that are not finite are errors."""

from __future__ import annotations

import numpy as np
import pytest
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from engines.accuracy import IDENTICAL, AccuracyError, check_finite, difference_of, psnr, tolerance, worst_difference
from engines.contract import Array, TensorSpec


def test_the_figures_are_polygraphys() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((3, 4, 5)).astype(np.float32)
    actual = expected + rng.standard_normal(expected.shape).astype(np.float32) / 100
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compare = SimpleCompareFunc(check_error_stat="max", atol=1)
        theirs = compare(IterationResult({"x": actual}), IterationResult({"x": expected}))["x"]
    ours, largest_value = difference_of(actual, expected), float(np.abs(expected).max())
    assert ours.largest == pytest.approx(theirs.max_absdiff / largest_value, rel=1e-5)
    assert ours.mean == pytest.approx(theirs.mean_absdiff / largest_value, rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_an_error(value: float) -> None:
    broken, sound = np.array([0.0, value]), np.zeros(2)
    for actual, expected in ((broken, sound), (sound, broken), (broken, broken)):
        with pytest.raises(AccuracyError, match="NaN or infinity"):
            difference_of(actual, expected)
        with pytest.raises(AccuracyError, match="NaN or infinity"):
            psnr(actual, expected)


def test_images_that_hide_nan_are_an_error() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    check_finite({"images": black, "is_finite": np.ones(2, np.float32)})
    with pytest.raises(AccuracyError, match="its images hold NaN or infinity"):
        check_finite({"images": black, "is_finite": np.array([1, 0], np.float32)})


def test_the_worst_of_several_outputs_counts() -> None:
    """Over as many images as there is a reference for; a wrong `is_finite` exceeds every tolerance."""
    right: dict[str, Array] = {"images": np.full((2, 4, 4, 3), 255, np.uint8), "is_finite": np.ones(2, np.float32)}
    first = {name: array[:1] for name, array in right.items()}
    assert worst_difference(right, first).largest == 0
    assert worst_difference(right | {"images": right["images"] - np.uint8(1)}, first).largest == 1 / 255
    assert worst_difference(right | {"is_finite": 1 - right["is_finite"]}, first).largest == 1


def test_rounding_explains_two_levels_of_an_image() -> None:
    image, finite = TensorSpec("images", "uint8", ("n", 3)), TensorSpec("is_finite", "float32", ("n",))
    assert (
        tolerance("fp32", [finite])
        < 1 / 255
        < tolerance("fp32", [image, finite])
        < 3 / 255
        < tolerance("fp16", [image])
    )


def test_psnr_is_in_decibels() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black, black) == IDENTICAL
    assert psnr(black + np.uint8(1), black) == pytest.approx(48.13, abs=0.01)
    assert psnr(black + np.uint8(255), black) == pytest.approx(0)
