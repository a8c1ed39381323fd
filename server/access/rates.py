"""Requests in a time, counted in a moving window for each caller, by the `limits` library."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

_MOST_REQUESTS = 100_000  # in one window: each is remembered
_MOST_CALLERS = 1024  # that are remembered; then the one that was quiet for longest is forgotten


def check_rate(text: str) -> str:
    """`text`, if it is a rate such as 60/minute. Raises ValueError."""
    from limits import parse_many  # noqa: PLC0415 - a sixth of a second, only where there is a limit

    try:
        (rate,) = parse_many(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a rate: write 60/minute, or 5 per 10 second") from None
    if not 1 <= rate.amount <= _MOST_REQUESTS or rate.get_expiry() < 1:
        raise ValueError(f"{text!r} is out of bounds: a rate allows 1 to {_MOST_REQUESTS} requests")
    return text


class Rates:
    """The requests of each caller in its moving window. For the event loop alone."""

    def __init__(self) -> None:
        from limits.storage import MemoryStorage  # noqa: PLC0415 - as above
        from limits.strategies import MovingWindowRateLimiter  # noqa: PLC0415

        self._windows = MovingWindowRateLimiter(MemoryStorage())
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    @property
    def known(self) -> int:
        """How many windows are remembered."""
        return len(self._known)

    def wait(self, rate: str, caller: str) -> int:
        """Whole seconds until one more request is within `rate`; 0: it is now."""
        from limits import parse  # noqa: PLC0415 - as above

        item = parse(rate)
        if self._windows.test(item, caller):
            return 0
        return max(math.ceil(self._windows.get_window_stats(item, caller).reset_time - time.time()), 1)

    def count(self, rate: str, caller: str) -> bool:
        """Count a request, if it is within `rate`; say whether it is."""
        from limits import parse  # noqa: PLC0415 - as above

        self._remember(rate, caller)
        return self._windows.hit(parse(rate), caller)

    def _remember(self, rate: str, caller: str) -> None:
        """The library forgets requests, and no caller: those who come from ever new addresses would take all memory."""
        from limits import parse  # noqa: PLC0415 - as above

        self._known[rate, caller] = None
        self._known.move_to_end((rate, caller))
        if len(self._known) > _MOST_CALLERS:
            (old_rate, old_caller), _ = self._known.popitem(last=False)
            self._windows.clear(parse(old_rate), old_caller)
