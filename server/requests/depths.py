"""How much of the UNet each step of a request computes, by the position of `cache`."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Literal, get_args

from engines.schedulers import Method, Table
from engines.step_cache import is_sensitive, step_size

Cache = Literal["off", "fast", "faster"]  # no position computes more than the one before
StepCache = Literal[Cache, "disabled"]  # of a server: the default of requests, or that there is none
Depth = Literal["full", "shallow"]  # how much of the UNet a step computes
DEPTHS: tuple[Depth, ...] = get_args(Depth)

FEW_STEPS = 4  # all full, and so many at least: fewer steps would spare the others too, with the same loss
_MANY_STEPS = 10  # of so many at least half are full, and up to three quarters the larger they are
_FAR = 0.45  # log SNR, a little more than twenty steps of most schedulers: from here on as many are full as with fast
_LARGE = 1.6  # log SNR, of which the share is measured: ten steps of most schedulers are half as large
# Steps that are full: one of so many, and so many more. Fresh noise at each step changes features more, and sensitive
# solvers multiply what changes.
_Shares = dict[Cache, tuple[int, int]]
_FULL: _Shares = {"off": (1, 0), "fast": (4, 1), "faster": (5, 1)}
_FULL_SENSITIVE: _Shares = {"off": (1, 0), "fast": (4, 1), "faster": (4, 1)}
_FULL_WITH_NOISE: _Shares = {"off": (1, 0), "fast": (3, 0), "faster": (4, 2)}
_FULL_WITH_NOISE_SENSITIVE: _Shares = {"off": (1, 0), "fast": (2, 2), "faster": (2, 2)}


def full_count(cache: Cache, table: Table, method: Method) -> int:
    """How many UNet calls of `table` are full, which `method` made; it may have fewer."""
    kinds = (_FULL, _FULL_SENSITIVE), (_FULL_WITH_NOISE, _FULL_WITH_NOISE_SENSITIVE)
    sensitive = is_sensitive(table) or (step_size(table) > _FAR and not table.draws)
    part, more = kinds[table.draws][sensitive][cache]
    calls, per_step = len(table.steps), method.about.calls_per_step
    size = step_size(table) * per_step * method.steps_at_once
    least = math.ceil(min(calls, _MANY_STEPS * per_step) * min(max(1 / 2, size / _LARGE), 3 / 4))
    return max(math.ceil(calls / part) + more, least, FEW_STEPS * per_step)


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
