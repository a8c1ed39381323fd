"""What each caller may take: requests in a time, and requests at once."""

from __future__ import annotations

import threading
from collections import Counter

from server.access.rates import Rates
from server.requests.context import Allowance, Caller
from server.requests.errors import RateLimited
from server.requests.request import Event, Outcome, Request

_SOON = 1  # seconds until a caller may see whether one of its requests is done
_UNLIMITED = Allowance()


class Allowances:
    """Counts the requests of each caller. For the event loop alone, but for places, which any thread gives back."""

    def __init__(self, default: Allowance = _UNLIMITED) -> None:
        """Callers without an allowance of their own have that of `default`."""
        self._default = default
        self._rates: Rates | None = None
        self._at_once: Counter[str] = Counter()
        self._lock = threading.Lock()

    def check(self, caller: Caller) -> None:
        """Raise what `take` would raise now."""
        rate, most = self._of(caller)
        if most is not None and self._at_once[caller.name] >= most:
            raise RateLimited(
                f"{most} of your requests are running or waiting, as many as you may have: wait for one of them.",
                retry_after=_SOON,
            )
        if rate is not None and (seconds := self._windows.wait(rate, caller.name)):
            raise RateLimited(f"You may send {rate}, and have: try again in {seconds} seconds.", retry_after=seconds)

    def take(self, caller: Caller) -> Place | None:
        """Count one more request, and return its place among those at once; None where they have no limit.

        Raises:
            RateLimited: the caller has as many as it may.
        """
        rate, most = self._of(caller)
        if rate is None and most is None:
            return None
        self.check(caller)
        if rate is not None:
            self._windows.count(rate, caller.name)
        return None if most is None else Place(self, caller.name)

    def at_once(self, caller: str) -> int:
        """How many places `caller` has."""
        return self._at_once[caller]

    def add(self, caller: str, places: int) -> None:
        """Count `places` more, or fewer, of a caller."""
        with self._lock:
            self._at_once[caller] += places
            if not self._at_once[caller]:
                del self._at_once[caller]

    def _of(self, caller: Caller) -> tuple[str | None, int | None]:
        own, default = caller.allowance, self._default
        most = default.concurrency if own.concurrency is None else own.concurrency
        return own.rate or default.rate, most

    @property
    def _windows(self) -> Rates:
        self._rates = self._rates or Rates()
        return self._rates


class Place:
    """One of the requests that a caller may have at once."""

    def __init__(self, allowances: Allowances, caller: str) -> None:
        self._allowances = allowances
        self._caller = caller
        self._lock = threading.Lock()
        self._taken = True
        allowances.add(caller, 1)

    def on_event(self, _request: Request, event: Event) -> None:
        """Give the place back at the outcome: a listener for `Request`."""
        if isinstance(event, Outcome):
            self.give_back()

    def give_back(self) -> None:
        """Give the place back. Later calls change nothing."""
        with self._lock:
            taken, self._taken = self._taken, False
        if taken:
            self._allowances.add(self._caller, -1)
