"""The shapes of steps on devices that capture them: row counts and prompt lengths that steps are padded to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engines.contract import MAX_CHUNKS
from engines.manifest_fields import LoraCapacity

CHUNK_BUCKETS = (1, 2, MAX_CHUNKS)  # prompts have 1, 2, 3 or 6 chunks, and 3 repeated are 6


def rank_buckets(capacity: LoraCapacity) -> tuple[int, ...]:
    """The ranks per row, ascending, that steps with LoRAs are padded to: half of the largest LoRA, or the most."""
    return tuple(sorted({max(capacity.rank // 2, 1), capacity.ranks_per_row}))


class StepBucket(NamedTuple):
    """A shape that steps are padded to: as many images as rows."""

    rows: int
    chunks: int


def row_buckets(built: Sequence[int], *, chunks: int = 1) -> tuple[int, ...]:
    """The row counts, ascending, of steps whose prompts have `chunks`, for a bundle with the row buckets `built`.

    Those of one chunk are, besides the bundle's own, 2, 4, 6, 8, 12, 16, 24, 32 … between its least and its largest:
    a third of a step's rows at most are padding. Longer prompts are rarer than each bucket's capture is worth.
    """
    if chunks > 1:
        return tuple(built)
    powers = [2**exponent for exponent in range(1, built[-1].bit_length())]
    ladder = {*powers, *(power * 3 // 2 for power in powers if power > 2)}
    return tuple(sorted({*built, *(rows for rows in ladder if built[0] <= rows <= built[-1])}))


def step_buckets(built: Sequence[int]) -> tuple[StepBucket, ...]:
    """Every shape, the largest first: what an allocator keeps of it is then enough for the others."""
    shapes = (StepBucket(rows, chunks) for chunks in CHUNK_BUCKETS for rows in row_buckets(built, chunks=chunks))
    return tuple(sorted(shapes, reverse=True))
