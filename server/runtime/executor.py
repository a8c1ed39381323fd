"""The thread that owns the device and runs the loop."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from engines.errors import DeviceLost, EngineError
from server.requests.errors import BrokenPicture, Cancelled, NotReady, StepFailed
from server.requests.request import Completed, Failed, Request, Started, Stepped
from server.runtime.batcher import Batch, Batcher
from server.runtime.metrics import Metrics
from server.runtime.pipeline import InFlightStep, PendingDecode, Pipeline
from server.runtime.plan import Plan
from server.runtime.step_times import StepTimeModel
from server.runtime.trace import Trace
from server.runtime.watchdog import Watchdog

_log = logging.getLogger(__name__)

_AHEAD = 2  # steps in flight: one that the device does, and one that it finds when it is done
_LOOK = 0.001  # seconds between looks for finished pictures, while nobody wants a step


class Executor:
    """Loads the pipeline, then takes batch after batch until the batcher is closed and everything has landed.

    Who takes which step does not depend on pixels, so steps are launched before their predecessors are done, and the
    device always finds the next one. What follows from a step, its events and pictures, happens when it lands.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        batcher: Batcher,
        load: Callable[[Callable[[str], None]], Pipeline],
        *,
        step_times: StepTimeModel,
        trace: Trace,
        metrics: Metrics,
        patience: float,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """`load` is called in the thread, with what tells of its progress; `patience` is the watchdog's."""
        self._batcher = batcher
        self._load = load
        self._step_times = step_times
        self._trace = trace
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._watchdog = Watchdog(self._bitten, patience=patience)
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._batch = Batch((), (), ())
        self._in_flight: deque[InFlightStep] = deque()
        self._pending_decodes: deque[PendingDecode] = deque()
        self._arriving: set[Request] = set()
        self._plan: Plan | None = None  # the last one
        self._mark = 0.0  # when the device was last known to begin a step
        self.state = "starting"
        self.ready = False
        self.stuck = False

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the accepted requests finish, and return when the thread has ended, or hangs."""
        self._batcher.close()
        while not self.stuck and self._thread.is_alive():
            self._thread.join(timeout=0.1)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.stuck

    @property
    def departing(self) -> int:
        """Requests that take no more steps and have no ending yet."""
        return len(self._pending_decodes)

    def _run(self) -> None:
        try:
            self._pipeline = self._load(self._say)
            self._pipeline.warm_up(self._say)
            self._watchdog.start()
            self.ready = True
            self._say("ready")
            self._on_ready()
            self._loop()
            del self._pipeline  # here and now: only the thread that opened the device may give back its memory
            self._say("stopped")
        except Exception as error:  # whatever it is, nobody may be left waiting for a thread that is gone
            self._give_up(error)
        finally:
            self.ready = False
            self._watchdog.close()
            self._trace.close()

    def _say(self, state: str) -> None:
        self.state = state

    def _loop(self) -> None:
        while True:
            batch = self._batcher.next_batch(patience=self._patience)
            if batch is None and not self._in_flight and not self._pending_decodes:
                return
            launched = batch is not None and self._take(batch)
            self._land(wait=not launched)
            self._collect(wait=batch is None and not self._in_flight)
            self._trace.collect()

    @property
    def _patience(self) -> float | None:
        """How long to wait for work: not at all while steps are in flight, and hardly while pictures are on the way."""
        if self._in_flight:
            return 0
        return _LOOK if self._pending_decodes else None

    def _take(self, batch: Batch) -> bool:
        """Let newcomers in and launch a step; whether one was launched."""
        self._batch = batch
        for request in batch.left:
            self._drop(request)
        for request in batch.joined:
            self._admit(request)
        arrived = [request for request in batch.requests if request.outcome is None and self._arrived(request)]
        if arrived:
            return self._launch(arrived)
        if arriving := [request for request in batch.requests if request in self._arriving]:
            self._await(arriving[0])
        return False

    def _await(self, request: Request) -> None:
        """Nobody has arrived who could step: wait for who comes next, but not while others' pictures are on the way."""
        if self._pending_decodes:
            time.sleep(_LOOK)
        elif not self._in_flight:
            with self._limit_of(request):
                self._pipeline.wait_for(request)

    def _limit_of(self, request: Request) -> AbstractContextManager[None]:
        """Watch what is done for `request` alone, before its first step and after its last."""
        size = request.params.size
        return self._watchdog.limit(
            self._step_times.ends(size) * request.images, f"A picture's way in or out at {size}"
        )

    def _drop(self, request: Request) -> None:
        self._arriving.discard(request)
        self._pipeline.release(request)
        request.end(Failed(Cancelled("The request was cancelled before its picture was done.")))

    def _admit(self, request: Request) -> None:
        request.finish_stage("queue")
        try:
            with self._trace.span("admit"), self._limit_of(request):
                self._pipeline.admit(request)
        except EngineError as error:
            self._fail([request], error)
        else:
            self._arriving.add(request)

    def _arrived(self, request: Request) -> bool:
        if request not in self._arriving:
            return True
        try:
            if not self._pipeline.arrived(request):
                return False
        except EngineError as error:
            self._fail([request], error)
            return False
        self._arriving.remove(request)
        request.finish_stage("encode")
        request.notify(Started())
        return True

    def _launch(self, requests: list[Request]) -> bool:
        size = requests[0].params.size
        with self._trace.span("plan"):
            plan = self._plan = self._pipeline.plan(requests)
        while self._pipeline.crowded(plan):
            self._land(wait=True)
            self._collect(wait=True)
        if not self._in_flight:
            self._mark = time.perf_counter()
        expected = self._step_times.seconds((size, plan.shape.depth), plan.shape.rows)
        try:
            with self._trace.span("launch"), self._watchdog.limit(expected, plan):
                in_flight = self._pipeline.step(plan)
        except EngineError as error:
            self._fail(requests, error)
            return False
        self._in_flight.append(in_flight)
        for request in plan.finishing:
            self._batcher.leave(request)
        return True

    def _land(self, *, wait: bool) -> None:
        """Bring home the steps that are done. Wait for the first if two are in flight already, or if told to."""
        while self._in_flight:
            in_flight = self._in_flight[0]
            if not in_flight.landed.done():
                if not (wait or len(self._in_flight) >= _AHEAD):
                    return
                expected = self._step_times.seconds(in_flight.kind, in_flight.plan.shape.rows)
                with self._trace.span("wait"), self._watchdog.limit(expected, in_flight.plan):
                    in_flight.landed.wait()
            with self._trace.span("land"):
                self._landed(in_flight)
            del self._in_flight[0]  # not before: whoever gives up looks here for those who wait
            wait = False

    def _landed(self, in_flight: InFlightStep) -> None:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._metrics.step(in_flight.plan.rows, seconds)
        self._step_times.observe(in_flight.kind, in_flight.plan.shape.rows, seconds)
        for request, step, preview in in_flight.moves:
            if request.outcome is None:
                shown = self._pipeline.colours(preview) if preview else None
                request.notify(Stepped(step, request.steps, shown))
        for request in in_flight.plan.finishing:
            if request.outcome is None:
                self._send_off(request)

    def _send_off(self, request: Request) -> None:
        request.finish_stage("denoise")
        try:
            with self._trace.span("decode"), self._limit_of(request):
                self._pending_decodes.append(self._pipeline.decode(request))
        except EngineError as error:
            self._fail([request], error)

    def _collect(self, *, wait: bool) -> None:
        """End the requests whose pictures are here. Wait for the first if told to."""
        while self._pending_decodes and (wait or self._pending_decodes[0].done()):
            pending_decode = self._pending_decodes[0]
            with self._trace.span("collect"), self._limit_of(pending_decode.request):
                self._depart(pending_decode)
            del self._pending_decodes[0]
            wait = False

    def _depart(self, pending_decode: PendingDecode) -> None:
        request = pending_decode.request
        try:
            outcome: Completed | Failed = Completed(pending_decode.images())
        except BrokenPicture as error:
            _log.error("request %s: %s", request.id, error)
            outcome = Failed(error)
        request.finish_stage("decode")
        self._pipeline.release(request)
        request.end(outcome)

    def _fail(self, requests: Sequence[Request], error: EngineError) -> None:
        """End those whom an engine failed; nobody goes on on a device that is lost."""
        if isinstance(error, DeviceLost):
            raise error
        _log.error("%d requests failed with their step: %s", len(requests), error)
        for request in requests:
            self._arriving.discard(request)
            self._pipeline.release(request)
            self._batcher.leave(request)
            request.end(Failed(StepFailed("The engine failed while this picture was made: ask again.")))

    def _give_up(self, error: Exception) -> None:
        """End everyone who waits, whichever room they are in."""
        self.ready = False
        self._say(f"stopped after a fault: {error}")
        self._batcher.close()
        batch = self._batch
        flying = [move.request for in_flight in tuple(self._in_flight) for move in in_flight.moves]
        departing = [pending_decode.request for pending_decode in tuple(self._pending_decodes)]
        for request in (*batch.left, *batch.joined, *batch.requests, *flying, *departing, *self._batcher.evict()):
            request.end(Failed(NotReady("The server is stopping after a fault: ask another one.", retry_after=5)))
        self._on_failure(error)

    def _bitten(self, what: str) -> None:
        """The device hangs, and this thread with it. Called in the watchdog's."""
        self.stuck = True
        _log.critical("%s The last plan: %s", what, self._last_plan())
        faulthandler.dump_traceback(sys.stderr)
        self._give_up(DeviceLost(f"{what} The process ends: see nvidia-smi and the kernel's log."))

    def _last_plan(self) -> str:
        """Whose it is, and its numbers without those that fill pages."""
        if self._plan is None:
            return "there was none."
        ids = ", ".join(placement.request.id for placement in self._plan.placements)
        return (
            f"of {ids}: { ({name: array.tolist() for name, array in self._plan.arrays.items() if array.size <= 64}) }"
        )
