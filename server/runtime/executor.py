"""The thread that owns the device and runs the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from engines.backends.device import Device
from engines.errors import DeviceLost, EngineError
from server.requests.request import Failed, Request
from server.runtime import failures
from server.runtime.batching.batcher import Batch, Batcher
from server.runtime.held_requests import HeldRequests
from server.runtime.loading import Loader, MakePipeline
from server.runtime.models import Models, OnStatus, Stopped
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.stacks import stacks
from server.runtime.monitoring.trace import Trace
from server.runtime.monitoring.watchdog import Watchdog
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.streams import Streams
from server.runtime.steps import Steps

_log = logging.getLogger(__name__)

_POLL = 0.001  # seconds between checks for what streams have done, while no step is launched


class Executor:
    """Loads the models, then takes batch after batch until the batcher is closed and everything has completed.

    All models run on one device, and share its streams.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        models: Models,
        batcher: Batcher,
        *,
        choose_backend: Callable[[OnStatus, Stopped], str],
        open_device: Callable[[str], Device],
        open_streams: Callable[[Device], Streams],
        make_pipeline: MakePipeline,
        trace: Trace,
        metrics: Metrics,
        hang_factor: float,
        on_ready: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """The parts that make things are called in the thread; for `hang_factor` see `Watchdog`."""
        self._models = models
        self._batcher = batcher
        self._trace = trace
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._watchdog = Watchdog(self._on_hang, factor=hang_factor)
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._batch = Batch((), (), ())
        self._pipelines: dict[str, Pipeline] = {}  # of the models that are loaded, by name
        self._requests = HeldRequests(models, self._pipelines, batcher, trace=trace, watchdog=self._watchdog)
        self._steps = Steps(
            self._requests,
            self._pipelines,
            models=models,
            batcher=batcher,
            trace=trace,
            metrics=metrics,
            watchdog=self._watchdog,
        )
        self._loader = Loader(
            models,
            self._pipelines,
            batcher=batcher,
            requests=self._requests,
            steps=self._steps,
            watchdog=self._watchdog,
            choose_backend=choose_backend,
            open_device=open_device,
            open_streams=open_streams,
            make_pipeline=make_pipeline,
            on_status=self._begin,
        )
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
        """Whether requests are accepted and may be expected to succeed; and the status, or the reason why not.

        That holds while it does for one model that is loaded.
        """
        if not self.ready:
            return False, self.status
        served = [model for model in self._models if model.state == "ready"]
        if not served:
            return False, "no model is loaded"
        if all(model.health.reason for model in served):
            return False, f"accepting requests, but {served[0].health.reason}"
        return True, self.status

    @property
    def decoding(self) -> int:
        """Requests that take no more steps and have no outcome yet."""
        return len(self._steps.decodes)

    def _run(self) -> None:
        try:
            self._loader.start()
            while self._loader.starting:
                self._turn()
            if self._loader.streams:
                self._trace.start(self._loader.streams.steps)
            self.ready = self.was_ready = True
            self.status = "ready"
            self._on_ready()
            while self._turn():
                self._test_health()
            self._give_back()
            self.status = "stopped"
        except Exception as error:  # whatever it is, no caller may wait for a thread that is gone
            self._fail_everything(error)
            failures.forget_tracebacks(error)
        finally:
            self._give_back()
            self.ready = False
            self._steps.noise.close()
            self._trace.close()

    def _give_back(self) -> None:
        """Drop what is on the device: its memory is freed in this thread, which opened it."""
        self._watchdog.close()
        self._pipelines.clear()
        for part in (self._requests, self._steps):
            part.clear()
        self._loader.close()

    def _begin(self, stage: str) -> None:
        """Begin a stage of the start. Raises StartStopped."""
        if self._batcher.closed:
            raise failures.StartStopped(f"The server was told to stop before it was ready: it was {self.status}.")
        self.status = stage

    def _turn(self) -> bool:
        """Launch a step, and complete what is done; returns whether there is, or may be, more to do."""
        self._loader.work()
        is_due = self._await_newcomers()
        batch = self._batcher.next_batch(timeout=self._timeout)
        if self._fault:
            raise self._fault
        if batch is None and not self._steps.in_flight and not self._steps.decodes:
            return False
        launched = batch is not None and self._start(batch, is_due=is_due)
        self._requests.upload_some()
        self._steps.complete(wait=not launched)
        self._steps.decodes.collect(wait=batch is None and not self._steps.in_flight)
        self._trace.collect()
        return True

    def _await_newcomers(self) -> bool:
        """Until the next step is due, admit and place those who come, who then take part in it. Whether it is due."""
        due = self._steps.due()
        if due is None or due <= time.perf_counter():
            return False
        step = self._steps.in_flight[0]
        with self._trace.span("wait"):
            while (left := due - time.perf_counter()) > 0 and not step.completed.done():
                decoded = self._steps.decodes.collect_one(wait=False)
                busy = decoded or self._requests.place_one() or self._requests.upload_some()
                if newcomer := self._batcher.next_newcomer(timeout=0 if busy else min(left, _POLL)):
                    self._requests.admit(newcomer)
        return True

    @property
    def _timeout(self) -> float | None:
        """How long to wait for work: not at all while steps are in flight, and briefly while images are decoded."""
        if self._steps.in_flight:
            return 0
        if self._steps.decodes:
            return _POLL
        if (patience := self._loader.patience) is not None:
            return patience
        return min((model.health.test_every for model in self._models if model.health.reason), default=None)

    def _test_health(self) -> None:
        for model in self._models:
            if model.state == "ready":
                model.health.test()

    def _start(self, batch: Batch, *, is_due: bool) -> bool:
        """Admit newcomers and launch a step, in this order unless it `is_due`; returns whether one was launched."""
        self._batch = batch
        requests, steps = self._requests, self._steps
        for request in batch.left:
            requests.finish(request, failures.left(request, server_stops=self._cancelling))
        if is_due and (placements := requests.placements(batch.requests)):
            launched = steps.launch_due(placements)
            requests.admit(*batch.joined)
            return launched
        requests.admit(*batch.joined)
        while requests.place_one():
            pass
        if placements := requests.placements(batch.requests):
            return steps.launch(placements)
        if requests.encoding and steps.decodes:
            time.sleep(_POLL)
        elif requests.encoding and not steps.in_flight:
            requests.wait_for_one()
        return False

    def _fail_everything(self, error: Exception) -> None:
        """Give every request that waits, wherever it is, its outcome."""
        self.ready = False
        self.status = f"stopped after a fault: {error}"
        self._batcher.close()
        self._finish_everyone(failures.after_fault())
        self._on_failure(error)

    def _finish_everyone(self, outcome: Failed) -> None:
        batch = self._batch
        others: tuple[Request, ...] = *batch.left, *batch.joined, *batch.requests, *self._batcher.evict()
        self._requests.finish_everyone(others, outcome)

    def _on_hang(self, what: str) -> None:
        """The device hangs, and this thread with it. Called in the watchdog's thread."""
        self.hangs = True
        plan = self._steps.last_plan
        _log.critical("%s The last plan: %s", what, plan.describe() if plan else "none.")
        _log.critical("the stacks of all threads:\n%s", stacks())
        self._fail_everything(DeviceLost(f"{what} The process ends: see nvidia-smi and the kernel's log."))
