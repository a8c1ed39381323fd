"""Loads and unloads models while others are served: in the executor's thread, a piece between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial

from engines.backends.device import Device
from engines.errors import DeviceLost, EngineError
from engines.manifest import Manifest
from server.requests.errors import ContentBlocked, ServerError
from server.requests.request import Failed, Request
from server.runtime import failures
from server.runtime.batching.batcher import Batcher
from server.runtime.held_requests import HeldRequests
from server.runtime.models import LoadedModel, Model, Models, OnStatus, Prepare, Stopped
from server.runtime.monitoring.watchdog import Watchdog
from server.runtime.pipeline.pieces import Pieces
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.streams import Streams
from server.runtime.steps import Steps

_log = logging.getLogger(__name__)

_POLL = 0.01  # seconds between looks at what a load waits for
_PIECE = 180.0  # seconds that a piece may be expected to take; the watchdog multiplies it

_Wait = Callable[[], object]  # gives something true when a load can go on
_Load = Generator[_Wait | None, None, None]
MakePipeline = Callable[[Model, Device, Streams], Pieces[Pipeline]]


class Loader:
    """Does what is wanted of `Models`, one load at a time. For the executor's thread.

    A piece of a load is one engine, or the steps of one shape in the warm-up: no other model takes a step meanwhile.
    While others have requests, pieces take at most half of the time.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        models: Models,
        pipelines: dict[str, Pipeline],
        *,
        batcher: Batcher,
        requests: HeldRequests,
        steps: Steps,
        watchdog: Watchdog,
        choose_backend: Callable[[OnStatus, Stopped], str],
        open_device: Callable[[str], Device],
        open_streams: Callable[[Device], Streams],
        make_pipeline: MakePipeline,
        on_status: OnStatus,
    ) -> None:
        """`on_status` is called while the server starts, and raises StartStopped where it shall not."""
        self._models, self._pipelines = models, pipelines
        self._batcher, self._requests, self._steps, self._watchdog = batcher, requests, steps, watchdog
        self._choose_backend, self._open_device = choose_backend, open_device
        self._open_streams, self._make_pipeline = open_streams, make_pipeline
        self._on_status = on_status
        self._device: Device | None = None
        self.streams: Streams | None = None
        self._starting: set[str] = set()
        self._model: Model | None = None  # that is being loaded
        self._pieces: _Load = _nothing()
        self._waits_for: _Wait | None = None
        self._not_before = 0.0  # when the next piece is due, if others have work

    def start(self) -> None:
        """Choose the backend, and ask for every model that is loaded at the start. Raises EngineError."""
        backend = self._choose_backend(self._on_status, lambda: self._batcher.closed)
        for model in self._models:
            model.backend = backend
        self._starting = {
            model.name for model in self._models if model.source.at_start or model is self._models.default
        }
        for model in self._models:
            if model.name in self._starting:
                self._models.load(model.name)

    @property
    def starting(self) -> bool:
        """Whether a model is still being loaded for the start."""
        self._starting = {name for name in self._starting if self._models.find(name).state == "loading"}
        return bool(self._starting)

    @property
    def patience(self) -> float | None:
        """The seconds after which to `work` again, if nothing else happens; None: when the batcher is woken."""
        if self._model is None:
            return None
        return _POLL if self._waits_for else 0.0  # without requests of others, the next piece is due at once

    def work(self) -> None:
        """Unload what is not used any more, and do the next piece of a load, if it is time.

        Raises:
            DeviceLost
            StartStopped: the server was told to stop before it was ready.
            EngineError: the default model cannot be loaded at the start.
        """
        for model in self._models:
            if model.state == "unloading" and model is not self._model and self._is_free(model):
                self._drop(model)
                self._models.unloaded(model)
                _log.info("the model %s is unloaded", model.name)
        if self._model is None and not self._begin():
            return
        if self._is_due():
            self._steps.complete_all()
            self._do_piece()

    def close(self) -> None:
        """Drop what was loaded so far of a model, and the device."""
        self._pieces.close()
        self._model, self._device, self.streams = None, None, None
        self._waits_for = None

    def _begin(self) -> bool:
        """Begin the next load; returns whether there is one."""
        if (model := next((one for one in self._models if one.state == "loading"), None)) is None:
            return False
        self._model, self._pieces = model, self._load(model)
        self._waits_for, self._not_before = None, 0.0
        return True

    def _is_due(self) -> bool:
        if self._waits_for and not self._waits_for():
            return False
        return time.perf_counter() >= self._not_before or not (self._batcher.running or self._batcher.waiting)

    def _do_piece(self) -> None:
        model = self._model
        assert model is not None  # noqa: S101 - it was begun
        if self._batcher.closed and model.name not in self._starting:
            self._models.unload(model.name)
        if model.state != "loading":  # it was told to stop; what it has is given back when its test image has ended
            self._end_load()
            return
        began = time.perf_counter()
        try:
            with self._watchdog.limit(_PIECE, f"Loading the model {model.name}"):
                self._waits_for = next(self._pieces)
        except StopIteration:
            self._end_load()
        except DeviceLost:
            raise
        except Exception as error:  # whatever it is: the other models are served as before
            if model.name in self._starting and (
                model is self._models.default or isinstance(error, failures.StartStopped)
            ):
                raise
            self._fail(model, error)
        now = time.perf_counter()
        self._not_before = now + now - began

    def _end_load(self) -> None:
        self._pieces.close()
        self._model = None
        self._batcher.wake()  # what follows is done in the next turn

    def _fail(self, model: Model, error: Exception) -> None:
        unexpected = None if isinstance(error, EngineError) else error
        _log.error("the model %s could not be loaded: %s", model.name, error, exc_info=unexpected)
        failures.forget_tracebacks(error)
        self._end_load()
        self._drop(model)
        if model.state == "loading":
            self._models.failed(model, str(error))
        else:
            self._models.unloaded(model)

    def _is_free(self, model: Model) -> bool:
        """Whether no request of `model` is left anywhere."""
        flying = any(step.batch_key.model == model.name for step in self._steps.in_flight)
        return not flying and self._batcher.is_idle(model.name) and not self._requests.holds(model.name)

    def _drop(self, model: Model) -> None:
        """Give back what `model` holds on the device, which frees it with the last reference."""
        self._pipelines.pop(model.name, None)
        self._steps.forget()
        model.memory, model.resident_loras = 0, frozenset()
        model.source.on_unloaded()

    def _load(self, model: Model) -> _Load:
        """Load `model`, piece by piece."""
        source, report = model.source, partial(self._report, model)
        if source.prepare:
            prepared = self._in_thread(source.prepare, model, report)
            yield prepared.done
            model.manifest = prepared.result()
        device, streams = self._opened(model.backend)
        while not self._models.make_room(model, evict=not self.starting):
            yield self._nothing_unloads
        report("loading the engines")
        before = sum(device.memory().values())
        pipeline = yield from self._make_pipeline(model, device, streams)
        source.on_loaded(LoadedModel(model.manifest, model.backend, pipeline))
        yield from pipeline.warm_up(report)
        model.memory = max(model.memory, sum(device.memory().values()) - before)
        self._pipelines[model.name] = pipeline
        yield from self._prove(model, report)
        self._models.loaded(model)
        _log.info("the model %s is loaded: %.0f MiB", model.name, model.memory / 2**20)

    def _in_thread(self, prepare: Prepare, model: Model, report: OnStatus) -> Future[Manifest]:
        """Prepare the files of `model` in a thread of its own: that may take minutes."""
        prepared: Future[Manifest] = Future()
        backend = model.backend

        def stopped() -> bool:
            return self._batcher.closed or model.state != "loading"

        def run() -> None:
            try:
                prepared.set_result(prepare(backend, report, stopped))
            except BaseException as error:
                prepared.set_exception(error)

        threading.Thread(target=run, name=f"prepare {model.name}", daemon=True).start()
        return prepared

    def _opened(self, backend: str) -> tuple[Device, Streams]:
        """The device and its streams, which all models share; opened for the first."""
        if self._device is None or self.streams is None:
            self._device = self._open_device(backend)
            self.streams = self._open_streams(self._device)
        return self._device, self.streams

    def _nothing_unloads(self) -> bool:
        return not any(model.state == "unloading" for model in self._models)

    def _prove(self, model: Model, report: OnStatus) -> _Load:
        """Draw an image as a request does. Raises EngineError: it failed, so every request would."""
        self._watchdog.start()
        report("drawing a test image")
        try:
            request = model.test_request()
            self._batcher.submit(request, proves=True)
        except ServerError as error:
            report("stopping")
            raise EngineError(f"No request can be served by this bundle's defaults: {error}") from error
        try:
            yield lambda: request.outcome
        finally:
            request.cancel()  # where the load was stopped
        _check(request, report)

    def _report(self, model: Model, status: str) -> None:
        model.status = status
        if model.name in self._starting:
            self._on_status(status if len(self._models) == 1 else f"{model.name}: {status}")


def _nothing() -> _Load:
    yield from ()


def _check(request: Request, report: OnStatus) -> None:
    """Raise EngineError if the test image failed."""
    outcome = request.outcome
    if isinstance(outcome, Failed) and not isinstance(outcome.error, ContentBlocked):
        report("stopping")
        reason = outcome.error.__cause__ or outcome.error
        raise EngineError(f"A test image failed, so every request would: {reason}")
