"""How much of the UNet each step of a request computes, by the position of `cache`."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Literal, get_args

from engines.schedulers import Table
from engines.step_cache import is_sensitive

Cache = Literal["off", "fast", "faster"]  # each position computes less than the one before
StepCache = Literal[Cache, "disabled"]  # of a server: the default of requests, or that there is none
Depth = Literal["full", "shallow"]  # how much of the UNet a step computes
DEPTHS: tuple[Depth, ...] = get_args(Depth)

FEW_STEPS = 4  # all full, and so many at least: fewer steps would spare the others too, with the same loss
_LARGE_STEPS = 10  # as far apart as those of so many, of which half are full
# Steps that are full: one of so many, and so many more. Fresh noise at each step changes features more, and sensitive
# solvers multiply what changes.
_Shares = dict[Cache, tuple[int, int]]
_FULL: _Shares = {"off": (1, 0), "fast": (4, 1), "faster": (5, 1)}
_FULL_SENSITIVE: _Shares = {"off": (1, 0), "fast": (4, 1), "faster": (4, 1)}
_FULL_WITH_NOISE: _Shares = {"off": (1, 0), "fast": (3, 0), "faster": (4, 2)}
_FULL_WITH_NOISE_SENSITIVE: _Shares = {"off": (1, 0), "fast": (2, 2), "faster": (2, 2)}


def full_count(cache: Cache, table: Table) -> int:
    """How many steps of `table` are full; it may have fewer."""
    kinds = (_FULL, _FULL_SENSITIVE), (_FULL_WITH_NOISE, _FULL_WITH_NOISE_SENSITIVE)
    part, more = kinds[table.draws][is_sensitive(table)][cache]
    steps = len(table.steps)
    return max(math.ceil(steps / part) + more, math.ceil(min(steps, _LARGE_STEPS) / 2), FEW_STEPS)


def depths_of(guided: Sequence[bool], full: Container[int]) -> tuple[Depth, ...]:
    """The depth of each step: those of `full` are full, and those whose rows have no features yet.

    Args:
        guided: for each step, whether guidance applies, which takes rows of its own.
        full: numbers of steps, from 0.
    """
    found, known = list[Depth](), False
    for step, is_guided in enumerate(guided):
        is_full = step in full or (is_guided and not known)
        known = is_guided if is_full else known
        found.append("full" if is_full else "shallow")
    return tuple(found)
