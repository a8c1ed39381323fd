"""The graphs and their contract: names, and the sizes that those who compute and those who plan agree about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]

GraphName = Literal["encode_prompt", "denoise", "denoise_shallow", "decode", "encode_image"]
GRAPHS: tuple[GraphName, ...] = ("encode_prompt", "denoise", "denoise_shallow", "decode", "encode_image")
STEPS: tuple[GraphName, ...] = ("denoise", "denoise_shallow")  # of the UNet; the others frame them

# The denoise graph's contract with whoever plans its steps: graphs.py computes it, scheduler tables fill it.
MEMORY = 3  # K: lanes of scheduler memory
LANES = 1 + MEMORY + 1  # x, the memory, and the x0 estimate that previews show
TERMS = 3 + MEMORY  # what a lane is made of: x, the model's output, fresh noise, the memory
INPAINT_LANES = 3  # what inpainting keeps of a picture: its latents, the noise over them, and where it stays as it is

# Prompts of several chunks share a step: shorter ones are repeated up to the longest, which attention does not notice,
# if repeated whole. So prompts have 1, 2, 3 or 6 chunks, the divisors of this.
MAX_CHUNKS = 6


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output. Dimensions that vary between calls are named, the others are numbers."""

    name: str
    dtype: str  # numpy's name: float32, int64, uint8
    shape: tuple[int | str, ...]
