"""The thread that owns the device and runs the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from engines.base import EngineError
from server.batcher import Batch, Batcher
from server.errors import Cancelled, NotReady, StepFailed
from server.metrics import Metrics
from server.pipeline import Pipeline
from server.request import Completed, Failed, Image, Request, Started, Stepped

_log = logging.getLogger(__name__)


class Executor:
    """Loads the pipeline, then takes batch after batch until the batcher is closed and empty."""

    def __init__(
        self,
        batcher: Batcher,
        load: Callable[[], Pipeline],
        *,
        warm_up: Sequence[Request],
        metrics: Metrics,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._batcher = batcher
        self._load = load
        self._warm_up = warm_up
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._current = Batch((), (), ())
        self.ready = False

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the accepted requests finish, and return when the thread has ended."""
        self._batcher.close()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._pipeline = self._load()
            for request in self._warm_up:
                self._rehearse(request)
            self.ready = True
            self._on_ready()
            while batch := self._batcher.next_batch():
                self._current = batch
                self._take(batch)
        except Exception as error:  # whatever it is, nobody may be left waiting for a thread that is gone
            self._give_up(error)
        finally:
            self.ready = False

    def _give_up(self, error: Exception) -> None:
        self.ready = False
        self._batcher.close()
        current = self._current
        for request in (*current.left, *current.joined, *current.requests, *self._batcher.evict()):
            request.end(Failed(NotReady("The server is stopping after a fault: ask another one.", retry_after=5)))
        self._on_failure(error)

    def _rehearse(self, request: Request) -> None:
        """Run one request outside the batcher, so that the first caller pays for nothing but the picture."""
        self._pipeline.admit(request)
        while not request.denoised:
            self._pipeline.step(self._pipeline.plan([request]))
        self._pipeline.decode(request)
        self._pipeline.release(request)

    def _take(self, batch: Batch) -> None:
        for request in batch.left:
            self._drop(request)
        for request in batch.joined:
            self._admit(request)
        if running := [request for request in batch.requests if request.ending is None]:
            self._step(running)

    def _drop(self, request: Request) -> None:
        self._pipeline.release(request)
        request.end(Failed(Cancelled("The request was cancelled before its picture was done.")))

    def _admit(self, request: Request) -> None:
        request.finish_stage("queue")
        try:
            self._pipeline.admit(request)
        except EngineError as error:
            self._fail([request], error)
            return
        request.finish_stage("encode")
        request.tell(Started())

    def _step(self, requests: list[Request]) -> None:
        started = time.perf_counter()
        plan = self._pipeline.plan(requests)
        try:
            self._pipeline.step(plan)
        except EngineError as error:
            self._fail(requests, error)
            return
        self._metrics.step(plan.rows, time.perf_counter() - started)
        for request in requests:
            request.tell(Stepped(request.step, request.steps, self._preview(request)))
            if request.denoised:
                self._finish(request)

    def _preview(self, request: Request) -> Image | None:
        every = request.wish.preview_every
        if not every or request.step % every or request.denoised:
            return None
        return self._pipeline.preview(request)

    def _finish(self, request: Request) -> None:
        request.finish_stage("denoise")
        try:
            images = self._pipeline.decode(request)
        except EngineError as error:
            self._fail([request], error)
            return
        request.finish_stage("decode")
        self._leave(request)
        request.end(Completed(images))

    def _fail(self, requests: Sequence[Request], error: EngineError) -> None:
        _log.error("%d requests failed with their step: %s", len(requests), error)
        for request in requests:
            self._leave(request)
            request.end(Failed(StepFailed("The engine failed while this picture was made: ask again.")))

    def _leave(self, request: Request) -> None:
        self._pipeline.release(request)
        self._batcher.leave(request)
