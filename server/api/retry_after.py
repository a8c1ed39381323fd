"""When callers who were refused together should come back: not together."""

from __future__ import annotations

import random
from collections.abc import Callable

_MOST = 120  # seconds; clients ignore more


def spread(seconds: int, *, dice: Callable[[], float] = random.random) -> int:
    """A whole number of seconds from `seconds`, or 80, to half as much again; `dice` gives 0 to 1."""
    first = min(seconds, _MOST * 2 // 3)
    last = min(max(first * 3 // 2, first + 1), _MOST)
    return first + int(dice() * (last - first + 1))
