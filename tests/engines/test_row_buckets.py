"""The shapes that captured steps are padded to."""

from __future__ import annotations

import numpy as np
import pytest

from engines.row_buckets import StepBucket, row_buckets, step_buckets

DEFAULT = (2, 4, 8, 16)


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (DEFAULT, (2, 4, 6, 8, 12, 16)),
        ((2, 8, 64), (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)),
        ((2, 16, 100, 200), (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100, 128, 192, 200)),  # the bundle's own stay
        ((1,), (1,)),
        ((1, 3), (1, 2, 3)),
        ((5, 11), (5, 6, 8, 11)),  # none is smaller than the bundle's least
    ],
)
def test_there_are_two_buckets_to_a_doubling(built: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert row_buckets(built) == expected


def test_long_prompts_have_the_rows_that_the_bundle_was_built_for() -> None:
    assert row_buckets((2, 8, 64), chunks=2) == row_buckets((2, 8, 64), chunks=6) == (2, 8, 64)


def test_the_largest_step_is_first_for_every_length_of_prompts() -> None:
    shapes = step_buckets(DEFAULT)
    assert shapes[:3] == (StepBucket(16, 6), StepBucket(16, 2), StepBucket(16, 1))
    assert list(shapes) == sorted(shapes, reverse=True)
    assert len(shapes) == len(set(shapes)) == 6 + 2 * 4


@pytest.mark.parametrize("built", [(2, 4, 8, 16, 32, 64), DEFAULT])
def test_half_of_the_padding_is_saved(built: tuple[int, ...]) -> None:
    """Over steps of 1 to the most guided images, each as likely as the others."""
    assert padding(row_buckets(built), built[-1]) < 0.6 * padding(built, built[-1])


def padding(buckets: tuple[int, ...], largest: int) -> float:
    """The share of computed rows that are padding."""
    rows = np.arange(2, largest + 1, 2)
    padded = np.array([min(bucket for bucket in buckets if bucket >= count) for count in rows])
    return 1 - float(rows.sum() / padded.sum())
