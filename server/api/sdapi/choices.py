"""The checkpoint that each caller has chosen with `POST options`.

The web UI has one user, and so one choice for all. Here it is the caller's own, and changes no other caller's images.
"""

from __future__ import annotations

from collections import OrderedDict

from server.requests.context import Caller
from server.runtime.models import Model, Models

_MOST = 1024  # callers; the choice of the one that has not been seen for longest is forgotten


class Choices:
    """Which model a caller's requests are for if they name none. For the event loop alone."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._names: OrderedDict[str, str] = OrderedDict()  # of models, by callers

    def of(self, caller: Caller) -> Model:
        if caller.name not in self._names:
            return self._models.default
        self._names.move_to_end(caller.name)
        return self._models.find(self._names[caller.name])

    def choose(self, caller: Caller, model: Model) -> None:
        self._names[caller.name] = model.name
        self._names.move_to_end(caller.name)
        if len(self._names) > _MOST:
            self._names.popitem(last=False)
