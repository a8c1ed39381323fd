"""Verdicts of a safety checker, from what its graph returns."""

from __future__ import annotations

from engines.contract import Array

_ABOVE = 0.0005  # diffusers rounds to three decimals, and flags what is above 0 then
_SPECIAL_CARE = 0.01  # what is added to the other scores of an image that resembles a special-care concept


def flagged(concepts: Array, special_care: Array) -> tuple[bool, ...]:
    """Whether each image is flagged, as StableDiffusionSafetyChecker decides.

    `concepts` [n, k] and `special_care` [n, j] are similarities above the concepts' thresholds. An image whose scores
    are not finite is flagged too.
    """
    careful = ~(special_care <= _ABOVE).all(axis=1, keepdims=True)
    below = concepts + careful * _SPECIAL_CARE <= _ABOVE
    return tuple(not image.all() for image in below)
