"""Which model takes the next step: equal shares of the device's time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


class FairModels:
    """Start-time fair queueing (Goyal, Vin & Cheng, 1996) of the models with requests, in seconds by weight.

    Steps of one model may take many times longer than those of another: counted in steps, it would have most of the
    device. A model that comes back has no credit for the time without requests, and still owes what it had before.
    """

    def __init__(self) -> None:
        self._served: defaultdict[str, float] = defaultdict(float)  # seconds by weight
        self._clock = 0.0  # what the model that is served had when its turn began

    def join(self, model: str) -> None:
        """`model` has requests again, and others have some."""
        self._served[model] = max(self._served[model], self._clock)

    def reset(self) -> None:
        """No model has requests: there is nothing to share."""
        self._served.clear()
        self._clock = 0.0

    def next(self, models: Iterable[str]) -> str:
        """The one of `models` that had the least; of several the first."""
        return min(models, key=self._served.__getitem__)

    def serve(self, model: str, seconds: float) -> None:
        """`model` takes a turn of so many seconds, by its weight."""
        self._clock = max(self._clock, self._served[model])
        self._served[model] += seconds
