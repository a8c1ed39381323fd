"""The thread that owns the device and runs the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from engines.errors import DeviceLost, EngineError
from server.requests.errors import ContentBlocked, ServerError
from server.requests.request import Failed, Outcome, Request, Started, Stepped
from server.runtime import failures
from server.runtime.admission import Admission, Finished, Owned, PendingDecode, Placement, Upload
from server.runtime.batcher import Batch, Batcher
from server.runtime.decodes import PendingDecodes, outcome_of
from server.runtime.launch_timing import LaunchTiming
from server.runtime.monitoring.health import Health
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.stacks import stacks
from server.runtime.monitoring.trace import Trace
from server.runtime.monitoring.watchdog import Watchdog
from server.runtime.noise import NoiseAhead
from server.runtime.pipeline import InFlightStep, Pipeline
from server.runtime.plan import Plan
from server.runtime.step_times import StepTimeModel, kind_of

_log = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 2  # steps: one that the device computes, and one that it finds when it is done
_POLL = 0.001  # seconds between checks for what streams have done, while no step is launched


class Executor:
    """Loads the pipeline, then takes batch after batch until the batcher is closed and everything has completed.

    Who takes which step does not depend on pixels, so steps are launched before their predecessors are done, and the
    device always finds the next one. What follows from a step, its events and images, happens when it completes.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        batcher: Batcher,
        load: Callable[[Callable[[str], None]], Pipeline],
        *,
        test_request: Callable[[], Request],
        step_times: StepTimeModel,
        trace: Trace,
        metrics: Metrics,
        hang_factor: float,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """`load` is called in the thread, with a callback for its status; for `hang_factor` see `Watchdog`.

        `test_request` makes a request that should succeed: it is run before the executor is ready, and while others
        fail. It raises ServerError where the model's defaults allow none.
        """
        self._batcher = batcher
        self._load = load
        self._test_request = test_request
        self._step_times = step_times
        self._trace = trace
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._watchdog = Watchdog(self._on_hang, factor=hang_factor)
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._batch = Batch((), (), ())
        self._owned: dict[Request, Owned] = {}  # what each admitted request holds, until its outcome
        self._encoding: list[Upload | Admission] = []
        self._in_flight: deque[InFlightStep] = deque()
        self._decodes = PendingDecodes(self._collect)
        self._noise = NoiseAhead()
        self._timing = LaunchTiming()
        self._plan: Plan | None = None  # the last one
        self._step_began = 0.0  # when the device was last known to begin a step
        self._health = Health(lambda: batcher.submit(test_request()))
        self._cancelling = False  # everyone, since the server stops
        self.status = "starting"
        self.ready = self.was_ready = self.hangs = False
        self._fault: EngineError | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the accepted requests finish, and return when the thread has ended, or hangs."""
        self._batcher.close()
        while not self.hangs and self._thread.is_alive():
            self._thread.join(timeout=0.1)

    def fail(self, error: EngineError) -> None:
        """End after a fault that another thread has found: nobody gets an image any more."""
        self._fault = error
        self.ready = False
        self._batcher.close()

    def stop_accepting(self) -> None:
        """Accept no more requests. What is not loaded yet is not loaded any more."""
        self._batcher.close()

    def cancel_everyone(self) -> None:
        """Cancel what was accepted: callers are answered when the steps that are launched have completed."""
        self._cancelling = True
        self._batcher.cancel()

    def answer_everyone(self) -> None:
        """Answer those who still wait, without waiting for the device. Called in another thread."""
        self._finish_everyone(failures.stopping())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.hangs

    @property
    def readiness(self) -> tuple[bool, str]:
        """Whether requests are accepted and may be expected to succeed; and the status, or the reason why not."""
        if self.ready and self._health.reason:
            return False, f"accepting requests, but {self._health.reason}"
        return self.ready, self.status

    @property
    def decoding(self) -> int:
        """Requests that take no more steps and have no outcome yet."""
        return len(self._decodes)

    def _run(self) -> None:
        try:
            self._pipeline = self._load(self._begin)
            self._pipeline.warm_up(self._begin)
            self._watchdog.start()
            self._begin("drawing a test image")
            self._prove()
            self._pipeline.start_trace()
            self.ready = self.was_ready = True
            self.status = "ready"
            self._on_ready()
            while self._turn():
                self._health.test()
            self._give_back()
            self.status = "stopped"
        except Exception as error:  # whatever it is, no caller may wait for a thread that is gone
            self._fail_everything(error)
            failures.forget_tracebacks(error)
        finally:
            self._give_back()
            self.ready = False
            self._noise.close()
            self._watchdog.close()
            self._trace.close()

    def _give_back(self) -> None:
        """Drop what is on the device: its memory is freed in this thread, which opened it."""
        vars(self).pop("_pipeline", None)  # it is missing after a failed start
        self._plan = None
        for held in (self._owned, self._encoding, self._in_flight, self._decodes):
            held.clear()

    def _begin(self, stage: str) -> None:
        """Begin a stage of the start. Raises StartStopped."""
        if self._batcher.closed:
            raise failures.StartStopped(f"The server was told to stop before it was ready: it was {self.status}.")
        self.status = stage

    def _prove(self) -> None:
        """Draw an image as a request does. Raises EngineError: it failed, so every request would."""
        try:
            request = self._test_request()
            self._batcher.submit(request)
        except ServerError as error:
            self._begin("stopping")
            raise EngineError(f"No request can be served by this bundle's defaults: {error}") from error
        while request.outcome is None:
            self._turn()
        if isinstance(request.outcome, Failed) and not isinstance(request.outcome.error, ContentBlocked):
            self._begin("stopping")
            reason = request.outcome.error.__cause__ or request.outcome.error
            raise EngineError(f"A test image failed, so every request would: {reason}")

    def _turn(self) -> bool:
        """Launch a step, and complete what is done; returns whether there is, or may be, more to do."""
        is_due = self._await_newcomers()
        batch = self._batcher.next_batch(timeout=self._timeout)
        if self._fault:
            raise self._fault
        if batch is None and not self._in_flight and not self._decodes:
            return False
        launched = batch is not None and self._start(batch, is_due=is_due)
        self._upload_some()
        self._complete_steps(wait=not launched)
        self._decodes.collect(wait=batch is None and not self._in_flight)
        self._trace.collect()
        return True

    def _await_newcomers(self) -> bool:
        """Until the next step is due, admit and place those who come, who then take part in it. Whether it is due."""
        step = self._in_flight[0] if len(self._in_flight) == 1 else None
        due = self._timing.due(step.key, self._step_began) if step else None
        if not step or due is None or due <= time.perf_counter():
            return False
        with self._trace.span("wait"):
            while (left := due - time.perf_counter()) > 0 and not step.completed.done():
                busy = self._decodes.collect_one(wait=False) or self._place_one() or self._upload_some()
                if newcomer := self._batcher.next_newcomer(timeout=0 if busy else min(left, _POLL)):
                    self._admit(newcomer)
        return True

    @property
    def _timeout(self) -> float | None:
        """How long to wait for work: not at all while steps are in flight, and briefly while images are decoded."""
        if self._in_flight:
            return 0
        if self._decodes:
            return _POLL
        return self._health.test_every if self._health.reason else None

    def _start(self, batch: Batch, *, is_due: bool) -> bool:
        """Admit newcomers and launch a step, in this order unless it `is_due`; returns whether one was launched."""
        self._batch = batch
        for request in batch.left:
            self._finish(request, failures.left(request, server_stops=self._cancelling))
        if is_due and (placements := self._placements(batch)):
            if launched := self._launch(placements):
                self._timing.launched(time.perf_counter(), late=self._in_flight[0].completed.done())
            self._admit(*batch.joined)
            return launched
        self._admit(*batch.joined)
        while self._place_one():
            pass
        if placements := self._placements(batch):
            return self._launch(placements)
        if self._encoding and self._decodes:
            time.sleep(_POLL)
        elif self._encoding and not self._in_flight:
            with self._limit_of(self._encoding[0].request):
                self._pipeline.await_encoding(self._encoding[0])
        return False

    def _placements(self, batch: Batch) -> list[Placement]:
        """Those who can take the step; others are still being encoded."""
        return [one for one in map(self._owned.get, batch.requests) if isinstance(one, Placement)]

    def _limit_of(self, *requests: Request) -> AbstractContextManager[None]:
        """Watch what is done for `requests` of one size alone, before their first step and after their last."""
        size = requests[0].params.size
        expected = self._step_times.encode_decode(size) * sum([request.images for request in requests])
        return self._watchdog.limit(expected, f"Encoding or decoding an image at {size}")

    def _admit(self, *requests: Request) -> None:
        for request in requests:
            request.finish_stage("queue")
            with self._fails_alone(request), self._trace.span("admit"), self._limit_of(request):
                admission = self._owned[request] = self._pipeline.admit(request)
                self._encoding.append(admission)

    def _fails_alone(self, *requests: Request) -> AbstractContextManager[None]:
        """What is done for `requests` alone: whatever goes wrong, only they fail, unless the device is lost.

        The pipeline holds nothing of a call that failed, so the others go on as if it had not been made.
        """
        return failures.contained(partial(self._fail, requests))

    def _place_one(self) -> bool:
        """Place one of the requests that are encoded; returns whether there was one."""
        admissions = (one for one in self._encoding if isinstance(one, Admission))
        if not (admission := next((one for one in admissions if one.encoded.done()), None)):
            return False
        self._encoding.remove(admission)
        request = admission.request
        if request in self._owned:  # otherwise it was cancelled
            with self._fails_alone(request):
                self._owned[request] = self._pipeline.place(admission)
                request.finish_stage("encode")
                request.notify(Started())
        return True

    def _upload_some(self) -> bool:
        """Write a part of the LoRAs of the request that is first; returns whether it was the last part of it."""
        if not (upload := next((one for one in self._encoding if isinstance(one, Upload)), None)):
            return False
        self._encoding.remove(upload)
        request = upload.request
        if request in self._owned:  # otherwise it was cancelled
            with self._fails_alone(request), self._trace.span("upload"), self._limit_of(request):
                stage = self._owned[request] = self._pipeline.upload(upload)
                self._encoding.insert(0, stage)
                return isinstance(stage, Admission)
        return True

    def _launch(self, placements: list[Placement]) -> bool:
        """Launch a step; returns whether that was possible: not while its images could not be staged."""
        if self._pipeline.lacks_staging(placements):
            if not self._in_flight:
                self._decodes.collect(wait=True)
            return False
        for drawing in [one for one in placements if one.draws_noise]:
            with self._fails_alone(drawing.request):
                drawing.noise.fetch()
        placements = [one for one in placements if one.request.outcome is None]
        return bool(placements) and self._launch_plan(placements)

    def _launch_plan(self, placements: list[Placement]) -> bool:
        with self._trace.span("plan"):
            plan = self._plan = self._pipeline.plan(placements)
        if not self._in_flight:
            self._step_began = time.perf_counter()
        kind = kind_of(placements[0].request.params.size, plan.shape.depth, loras=bool(plan.shape.ranks))
        expected = self._step_times.seconds(kind, plan.shape.rows)
        try:
            with self._trace.span("launch"), self._watchdog.limit(expected, plan):
                step = self._pipeline.step(plan)
        except EngineError as error:
            self._fail([placement.request for placement in placements], error)
            return False
        self._in_flight.append(step)
        for finished in step.finished:
            self._owned[finished.request] = finished
            self._batcher.leave(finished.request)
        if step.finished and not step.completed.done():  # where it is done, callers hear of that first
            self._decode(step)
        if coming := [placement.noise for placement in placements if placement.draws_noise]:
            self._noise.begin(coming)
        return True

    def _complete_steps(self, *, wait: bool) -> None:
        """Handle the steps that the device has done. Wait for the first if two are in flight, or if asked to."""
        while self._in_flight:
            step = self._in_flight[0]
            if not step.completed.done():
                if not (wait or len(self._in_flight) >= _MAX_IN_FLIGHT):
                    return
                expected = self._step_times.seconds(step.kind, step.plan.shape.rows)
                with self._trace.span("wait"), self._watchdog.limit(expected, step.plan):
                    step.completed.wait()
            with self._trace.span("complete"):
                self._complete(step)
            self._in_flight.popleft()
            wait = False

    def _complete(self, step: InFlightStep) -> None:
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        self._metrics.step(step.plan.rows, seconds)
        self._step_times.observe(step.kind, step.plan.shape.rows, seconds)
        self._timing.observe(step.key, seconds)
        for request, number, previews in step.moves:
            if request.outcome is None and previews:
                with self._fails_alone(request):
                    request.notify(Stepped(number, request.steps, tuple(map(self._pipeline.to_rgb, previews))))
            elif request.outcome is None:
                request.notify(Stepped(number, request.steps))
        for finished in step.finished:
            if finished.request.outcome is None:
                finished.request.finish_stage("denoise")
        self._decode(step)
        for finished in step.finished:
            if isinstance(pending := self._owned.get(finished.request), PendingDecode):
                self._decodes.add(pending)

    def _decode(self, step: InFlightStep) -> None:
        """Launch the decoding of those who finished in `step`, behind it, unless that is done."""
        owned = [self._owned.get(finished.request) for finished in step.finished]
        if finished := [one for one in owned if isinstance(one, Finished) and one.request.outcome is None]:
            requests = [one.request for one in finished]
            with self._fails_alone(*requests), self._trace.span("decode"), self._limit_of(*requests):
                for pending in self._pipeline.decode(finished, step.completed):
                    self._owned[pending.request] = pending

    def _collect(self, pending: PendingDecode) -> None:
        with self._trace.span("collect"), self._limit_of(pending.request):
            outcome = outcome_of(pending)
        pending.request.finish_stage("decode")
        self._finish(pending.request, outcome)

    def _finish(self, request: Request, outcome: Outcome) -> None:
        """Release what `request` holds, and give it its outcome."""
        if owned := self._owned.get(request):
            owned.release()
        self._health.observe(outcome)
        request.finish(outcome)
        self._owned.pop(request, None)  # not before: `_fail_everything` finds here the requests without an outcome

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Finish those whose call failed. A lost device ends the process instead."""
        if isinstance(error, DeviceLost):
            raise error
        failed = failures.failed(error, ", ".join(request.id for request in requests))
        for request in requests:
            self._batcher.leave(request)
            self._finish(request, failed)

    def _fail_everything(self, error: Exception) -> None:
        """Give every request that waits, wherever it is, its outcome."""
        self.ready = False
        self.status = f"stopped after a fault: {error}"
        self._batcher.close()
        self._finish_everyone(failures.after_fault())
        self._on_failure(error)

    def _finish_everyone(self, outcome: Failed) -> None:
        batch = self._batch
        for request in (*batch.left, *batch.joined, *batch.requests, *tuple(self._owned), *self._batcher.evict()):
            request.finish(outcome)

    def _on_hang(self, what: str) -> None:
        """The device hangs, and this thread with it. Called in the watchdog's thread."""
        self.hangs = True
        _log.critical("%s The last plan: %s", what, self._plan.describe() if self._plan else "none.")
        _log.critical("the stacks of all threads:\n%s", stacks())
        self._fail_everything(DeviceLost(f"{what} The process ends: see nvidia-smi and the kernel's log."))
