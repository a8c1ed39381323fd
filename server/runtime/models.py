"""The models of the server: which there are, which are loaded, and requests to load and unload them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from engines.backends.device import Reader
from engines.manifest import Manifest
from server.requests.errors import FieldError, UnknownModel
from server.requests.intake import Intake
from server.runtime.pipeline import Pipeline
from server.runtime.safety import UNCHECKED, Safety
from server.runtime.step_times import StepTimeModel

State = Literal["unloaded", "loading", "ready", "unloading", "failed"]
OnStatus = Callable[[str], None]  # called with what the runtime is doing, in a few words
Stopped = Callable[[], bool]  # says whether to stop
Prepare = Callable[[str, OnStatus, Stopped], Manifest]


class LoadedModel(NamedTuple):
    """A model whose engines are loaded."""

    manifest: Manifest
    backend: str
    pipeline: Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A bundle that the server may load, under a name that is unique in the server."""

    name: str
    manifest: Manifest  # as read
    bundle: Path
    backend: str  # the one that is expected to serve it
    at_start: bool = True  # whether it is loaded when the server starts; the first of all is in any case
    # Makes the files of the bundle ready to be read by a backend: opens and verifies them, compiles engines that are
    # missing. It is called before each load, in a thread of its own, with the backend, a status callback and a function
    # that says whether to stop; it returns the manifest to load, and raises EngineError.
    prepare: Prepare | None = None
    safety: Safety = UNCHECKED  # whether its images are checked, and what becomes of flagged ones
    read: Reader = Path.read_bytes  # gives the contents of a file of the bundle
    on_loaded: Callable[[LoadedModel], None] = lambda _model: None  # in the executor's thread, as the next one
    on_unloaded: Callable[[], None] = lambda: None


class Model:
    """One model of the server. For any thread."""

    def __init__(self, source: ModelSource, intake: Intake) -> None:
        self.source = source
        self.name = source.name
        self.manifest = source.manifest  # as loaded, once it is
        self.backend = source.backend
        self.intake = intake
        self.step_times = StepTimeModel(max_rows=source.manifest.max_rows)
        self.state: State = "unloaded"
        self.reason = ""  # of a failure

    @property
    def ready(self) -> bool:
        """Whether its requests are accepted."""
        return self.state == "ready"


class Models(Collection[Model]):
    """Every model that the server may load. For any thread."""

    def __init__(self, models: Sequence[Model]) -> None:
        """The first is the default. Names are unique."""
        self._models = {model.name: model for model in models}
        self.default = models[0]

    def find(self, name: str | None) -> Model:
        """The model of that name; None or "" is the default. Raises UnknownModel."""
        if not name:
            return self.default
        if found := self._models.get(name):
            return found
        message = f"The model {name!r} does not exist: this server has {', '.join(self._models)}."
        raise UnknownModel(message, fields=(FieldError("model", message),))

    def load(self, name: str) -> None:
        """Ask for a model to be loaded, unless it is; returns at once: its state says how that goes.

        Raises:
            UnknownModel
            ModelNotLoaded: it does not fit into the memory for models, and says what to unload.
        """
        self.find(name)

    def unload(self, name: str) -> None:
        """Let the accepted requests of a model finish, then give back its memory; returns at once.

        From now on its requests are refused with ModelNotLoaded. Raises UnknownModel.
        """
        self.find(name)

    def __contains__(self, model: object) -> bool:
        return model in self._models.values()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)
