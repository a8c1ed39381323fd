"""Bounds of what a request may ask for, which a bundle's defaults keep to as well."""

from __future__ import annotations

from typing import Final

MAX_STEPS: Final = 200  # denoising steps
MAX_GUIDANCE: Final = 50.0  # guidance scale
MAX_SIDE: Final = 8192  # pixels of an image, in each direction
PROMPT_LENGTH: Final = 4000  # characters
