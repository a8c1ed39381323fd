"""How far one computation differs from another: of arrays relative to their range, of images in PSNR."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engines.contract import Array, Arrays, TensorSpec
from engines.errors import EngineError
from engines.manifest import Difference, Precision

IDENTICAL = 999.0  # dB, of equal images
# Eight bits: 0.20 (FP8) and 0.15 (INT8) were measured along the demo's trajectories.
_TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 5e-2,
    "bf16": 2e-1,
    "fp8": 2.5e-1,
    "int8": 2.5e-1,
}  # largest error, relative to the range
_ROUNDING = 2 / 255  # of images: a value between two levels may become either


class AccuracyError(EngineError):
    """An output cannot be compared: it holds NaN or infinity."""


def check_finite(outputs: Arrays) -> None:
    """Raise AccuracyError where a graph's outputs hold NaN or infinity, or its `is_finite` says that they would.

    Pixels are whole numbers, which hide what is not finite: of images `is_finite` alone can say it.
    """
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise AccuracyError(f"{name} holds NaN or infinity")
    if not np.all(outputs.get("is_finite", 1)):
        raise AccuracyError("its images hold NaN or infinity")


def worst_difference(actual: Arrays, expected: Arrays) -> Difference:
    """The worst of all outputs, over as many of their first entries as are expected. Raises AccuracyError."""
    return worst_of(difference_of(actual[name][: len(array)], array) for name, array in expected.items())


def difference_of(actual: Array, expected: Array) -> Difference:
    """Errors relative to the largest expected value. Raises AccuracyError where either holds NaN or infinity."""
    check_finite({"the output": actual, "the expected output": expected})
    values, wanted = actual.astype(np.float64), expected.astype(np.float64)
    errors = np.abs(values - wanted) / max(float(np.abs(wanted).max()), 1e-6)
    return Difference(largest=float(errors.max()), mean=float(errors.mean()))


def worst_of(differences: Iterable[Difference]) -> Difference:
    """The largest figures of several differences."""
    found = list(differences)
    return Difference(largest=max(one.largest for one in found), mean=max(one.mean for one in found))


def tolerance(precision: Precision, outputs: Iterable[TensorSpec]) -> float:
    """The largest error, relative to the range, that computing in `precision` explains for any of `outputs`."""
    rounded = any(output.dtype == "uint8" for output in outputs)
    return max(_TOLERANCE[precision], _ROUNDING if rounded else 0.0)


def psnr(image: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio of two images or batches of images, values 0..255 of any dtype, in dB.

    Raises:
        AccuracyError: either holds NaN or infinity.
    """
    check_finite({"the image": image, "the expected image": expected})
    error = float(np.mean((image.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else IDENTICAL
