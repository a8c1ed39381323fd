"""Bounds of what a request may ask for. The options of a build keep to them, since they are defaults of requests."""

from __future__ import annotations

from typing import Final

MAX_ROWS: Final = 1024  # rows of the UNet in a step
MAX_STEPS: Final = 200  # denoising steps
MAX_GUIDANCE: Final = 50.0  # guidance scale
MIN_SIDE: Final = 8  # pixels of an image, in each direction
MAX_SIDE: Final = 8192
PROMPT_LENGTH: Final = 4000  # characters
LONGEST_NAME: Final = 200  # characters, of a model
