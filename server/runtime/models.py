"""The models of the server: which there are, which are loaded, and requests to load and unload them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from engines.backends.available import files_of
from engines.backends.device import Reader
from engines.errors import BundleError, EngineError
from engines.manifest import Manifest
from server.requests.errors import FieldError, ModelNotLoaded, UnknownModel
from server.requests.intake import Intake
from server.requests.request import Request
from server.requests.schemas import GenerateRequest
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.step_times import StepTimeModel
from server.runtime.monitoring.health import Health
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.safety import UNCHECKED, Safety

State = Literal["unloaded", "loading", "ready", "unloading", "failed"]
OnStatus = Callable[[str], None]  # called with what the runtime is doing, in a few words
Stopped = Callable[[], bool]  # says whether to stop
Prepare = Callable[[str, OnStatus, Stopped], Manifest]

_TEST_STEPS = 2
_RETRY_AFTER = 5  # seconds


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

    def __init__(self, source: ModelSource, intake: Intake, batcher: Batcher) -> None:
        self.source = source
        self.name = source.name
        self.manifest = source.manifest  # as loaded, once it is
        self.backend = source.backend
        self.intake = intake
        self.step_times = StepTimeModel(max_rows=source.manifest.max_rows)
        self.health = Health(lambda: batcher.submit(self.test_request()))
        self.state: State = "unloaded"
        self.status = "not loaded"  # what is done with it, in a few words
        self.reason = ""  # of a failure
        self.memory = 0  # bytes that it takes, or is expected to take, while it is loaded
        self.resident_loras = frozenset[str]()  # hashes of the LoRAs that the device holds

    @property
    def ready(self) -> bool:
        """Whether its requests are accepted, and may be expected to succeed."""
        return self.state == "ready" and not self.health.reason

    @property
    def is_held(self) -> bool:
        """Whether it takes memory, or is about to."""
        return self.state in ("loading", "ready", "unloading")

    @property
    def needed(self) -> int:
        """The bytes that loading it takes at least: its files and its pools. What engines need to work comes on top."""
        return needed_memory(self.manifest, self.source.bundle, self.backend)

    def test_request(self) -> Request:
        """A short request by its defaults, which should succeed. Raises ServerError where they allow none."""
        prompt = next(iter(self.manifest.examples), "")
        self.intake.request(GenerateRequest(prompt=prompt))  # with the default number of steps
        steps = min(self.manifest.defaults.num_inference_steps, _TEST_STEPS)
        return self.intake.request(GenerateRequest(prompt=prompt, seed=0, num_inference_steps=steps))


class Models(Collection[Model]):
    """Every model that the server may load. For any thread.

    `load` and `unload` say what is wanted; the executor's thread does it, and reports it with `loaded`, `failed` and
    `unloaded`. What counts when it is done is what was wanted last.
    """

    def __init__(self, models: Sequence[Model], batcher: Batcher, *, memory: int | None = None) -> None:
        """The first is the default. Names are unique. `memory` limits the bytes that loaded models take together."""
        self._models = {model.name: model for model in models}
        self._batcher = batcher
        self._memory = memory
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self.default = models[0]
        for model in models:
            ranks = model.manifest.lora.ranks if model.manifest.lora else 0
            batcher.add(model.name, max_rows=model.manifest.max_rows, lora_ranks=ranks, step_times=model.step_times)
            self._refuse(model)

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
        model = self.find(name)
        with self._lock:
            if model.state in ("unloaded", "failed"):
                self._check_memory(model)
                self._begin(model)
            self._wanted.add(model.name)

    def unload(self, name: str) -> None:
        """Let the accepted requests of a model finish, then give back its memory; returns at once.

        From now on its requests are refused with ModelNotLoaded. Raises UnknownModel.
        """
        model = self.find(name)
        with self._lock:
            self._wanted.discard(model.name)
            if model.state in ("loading", "ready"):
                self._end(model)
            elif model.state == "failed":
                self._set(model, "unloaded", "not loaded")

    # What the executor's thread reports.

    def loaded(self, model: Model) -> None:
        """`model` can be served, unless it was unloaded meanwhile."""
        with self._lock:
            if model.state == "loading":
                self._set(model, "ready", "ready")

    def failed(self, model: Model, reason: str) -> None:
        """`model` was not loaded, and holds nothing."""
        with self._lock:
            self._wanted.discard(model.name)
            self._set(model, "failed", "failed", reason)

    def unloaded(self, model: Model) -> None:
        """`model` holds nothing any more. If it was wanted again meanwhile, it is loaded again."""
        with self._lock:
            if model.name in self._wanted:
                self._begin(model)
            else:
                self._set(model, "unloaded", "not loaded")

    def make_room(self, model: Model, *, evict: bool) -> bool:
        """Reserve the memory that `model` needs; False: another one is being unloaded for it, so ask again.

        With `evict`, models are unloaded that have no requests, and had none for longest. Raises EngineError where
        there is no room.
        """
        with self._lock:
            needed = model.needed
            if self._memory is None or self._taken() + needed <= self._memory:
                model.memory = needed
                return True
            if any(one.state == "unloading" for one in self):
                return False
            if evict and self._evict():
                return False
            raise EngineError(self._no_room(needed))

    def _evict(self) -> bool:
        """Begin to unload the model without requests that had none for longest; returns whether there is one."""
        for model in sorted(self, key=lambda one: self._batcher.last_used(one.name)):
            if model.state == "ready" and self._batcher.refuse_idle(model.name, _gone(model)):
                self._wanted.discard(model.name)
                self._set(model, "unloading", "unloading, as another model needs its memory")
                return True
        return False

    def _begin(self, model: Model) -> None:
        self._set(model, "loading", "waiting to be loaded")

    def _end(self, model: Model) -> None:
        self._set(model, "unloading", "unloading")

    def _set(self, model: Model, state: State, status: str, reason: str = "") -> None:
        model.state, model.status, model.reason = state, status, reason
        if state == "ready":
            self._batcher.accept(model.name)
        else:
            self._refuse(model)
        self._batcher.wake()  # the executor's thread looks what is to be done

    def _refuse(self, model: Model) -> None:
        retry_after = _RETRY_AFTER if model.state == "loading" else None
        self._batcher.refuse(model.name, _gone(model), retry_after=retry_after)

    def _taken(self) -> int:
        return sum(model.memory for model in self if model.is_held)

    def _check_memory(self, model: Model) -> None:
        """Raise ModelNotLoaded where `model` has no room, even if every idle model is unloaded."""
        if self._memory is None:
            return
        needed = model.needed
        busy = [one for one in self if one.is_held and not (one.state == "ready" and self._batcher.is_idle(one.name))]
        if needed + sum(one.memory for one in busy) > self._memory:
            raise ModelNotLoaded(self._no_room(needed), retry_after=_RETRY_AFTER)

    def _no_room(self, needed: int) -> str:
        held = ", ".join(f"{model.name} {_mib(model.memory)}" for model in self if model.is_held) or "none"
        return (
            f"The model needs {_mib(needed)}, and models may take {_mib(self._memory or 0)} together ({held} loaded): "
            "unload another one first, or raise the limit."
        )

    def __contains__(self, model: object) -> bool:
        return model in self._models.values()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)


def needed_memory(manifest: Manifest, bundle: Path, backend: str) -> int:
    """The bytes of the files that `backend` loads from `bundle`, and of the pools, without engines that are missing."""
    sizes = {bundle / file.path: file.size for file in manifest.files}
    try:
        files = files_of(manifest, backend, bundle)
    except BundleError:  # they are compiled before it is loaded
        files = set()
    return manifest.pool_bytes + sum(sizes[path] for path in files)


def _gone(model: Model) -> str:
    if model.state == "loading":
        return f"The model {model.name} is being loaded: try again soon."
    if model.state == "failed":
        return f"The model {model.name} could not be loaded ({model.reason}): choose another one."
    return f"The model {model.name} is not loaded: load it, or choose another one."


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
