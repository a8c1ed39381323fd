"""The figures of verification are Polygraphy's, and what is no number is no picture."""

from __future__ import annotations

import numpy as np
import pytest
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from engines.build.verify import VerificationError, difference_of, psnr, tolerance, worst_difference
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
def test_an_output_that_is_no_number_is_an_error(value: float) -> None:
    with pytest.raises(VerificationError, match="NaN or infinity"):
        difference_of(np.array([0.0, value]), np.zeros(2))


def test_of_several_outputs_the_worst_counts() -> None:
    """In as many pictures as there is a reference for; one that is told wrongly to be sound exceeds every tolerance."""
    right: dict[str, Array] = {"images": np.full((2, 4, 4, 3), 255, np.uint8), "sound": np.ones(2, np.float32)}
    first = {name: array[:1] for name, array in right.items()}
    assert worst_difference(right, first).largest == 0
    assert worst_difference(right | {"images": right["images"] - np.uint8(1)}, first).largest == 1 / 255
    assert worst_difference(right | {"sound": 1 - right["sound"]}, first).largest == 1


def test_rounding_explains_two_levels_of_a_picture() -> None:
    image, sound = TensorSpec("images", "uint8", ("n", 3)), TensorSpec("sound", "float32", ("n",))
    assert (
        tolerance("fp32", [sound]) < 1 / 255 < tolerance("fp32", [image, sound]) < 3 / 255 < tolerance("fp16", [image])
    )


def test_psnr_is_what_the_word_means() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black, black) == 999
    assert psnr(black + np.uint8(1), black) == pytest.approx(48.13, abs=0.01)
    assert psnr(black + np.uint8(255), black) == pytest.approx(0)
