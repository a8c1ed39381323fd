"""When to launch the step after the one that the device computes: late, so that newcomers join it, but not too late."""

from __future__ import annotations

from server.requests.request import BatchKey
from server.runtime.pipeline.plan import StepShape

_JITTER = 0.05  # of a step: how much less than the least of the last ones it may take
_WAKING = 0.001  # seconds: an operating system may wake a thread so late
_FORGETTING = 0.02  # of what was the most, or least, with every step since
_DISTRUST = 16, 1024  # steps that are launched at once after a late one: the first time, and at most

Key = tuple[BatchKey, StepShape]


class LaunchTiming:
    """Predicts when the device will want the next step, from how long steps and launches took.

    Steps of one shape take the same time on a GPU, so the least of the last ones is a safe guess. A step that was
    launched too late all the same costs more than newcomers gain: after it, steps are launched at once for a while.
    For one thread; moments are on perf_counter's clock.
    """

    def __init__(self) -> None:
        self._least: dict[Key, float] = {}  # seconds that steps take, at least
        self._launch = 0.0  # seconds from the moment to launch until a step is launched, at most
        self._at_once = 0  # steps that will be launched without waiting
        self._distrust = float(_DISTRUST[0])
        self._due: float | None = None

    def due(self, key: Key, began: float) -> float | None:
        """The moment to launch the next step, if the one that `began` is of shape `key`; None for at once."""
        least = self._least.get(key)
        self._due = None
        if self._at_once:
            self._at_once -= 1
        elif least is not None:
            self._due = began + least * (1 - _JITTER) - 2 * self._launch - _WAKING
        return self._due

    def launched(self, now: float, *, late: bool) -> None:
        """A step was launched that waited until it was due; `late`: when the device had done the one before."""
        assert self._due is not None  # noqa: S101 - it waited
        self._launch = max(self._launch * (1 - _FORGETTING), now - self._due)
        if late:
            self._at_once = int(self._distrust)
            self._distrust = min(2 * self._distrust, _DISTRUST[1])
        else:
            self._distrust = max(self._distrust * (1 - _FORGETTING), _DISTRUST[0])

    def observe(self, key: Key, seconds: float) -> None:
        """A step took so long, as far as the host saw."""
        least = self._least.get(key, seconds)
        self._least[key] = min(seconds, least + (seconds - least) * _FORGETTING)
