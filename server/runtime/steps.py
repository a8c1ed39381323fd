"""Steps: launched ahead of the device, completed when it has done them, and decoded behind their last."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from engines.errors import EngineError
from server.requests.request import Request, Stepped
from server.runtime.batching.batcher import Batcher
from server.runtime.batching.step_times import kind_of
from server.runtime.decodes import PendingDecodes, outcome_of
from server.runtime.held_requests import HeldRequests
from server.runtime.launch_timing import LaunchTiming
from server.runtime.models import Models
from server.runtime.monitoring.metrics import Metrics
from server.runtime.monitoring.trace import Trace
from server.runtime.monitoring.watchdog import Watchdog
from server.runtime.pipeline.admission import Finished, PendingDecode, Placement
from server.runtime.pipeline.noise import NoiseAhead
from server.runtime.pipeline.pipeline import InFlightStep, Pipeline
from server.runtime.pipeline.plan import Plan

_MAX_IN_FLIGHT = 2  # steps: one that the device computes, and one that it finds when it is done


class Steps:
    """The steps in flight, of any model, and the images that are decoded. For the executor's thread.

    Who takes which step does not depend on pixels, so steps are launched before their predecessors are done, and the
    device always finds the next one. What follows from a step, its events and images, happens when it completes.
    """

    def __init__(  # noqa: PLR0913 - the parts, all by keyword
        self,
        requests: HeldRequests,
        pipelines: Mapping[str, Pipeline],
        *,
        models: Models,
        batcher: Batcher,
        trace: Trace,
        metrics: Metrics,
        watchdog: Watchdog,
    ) -> None:
        self._requests, self._pipelines, self._models = requests, pipelines, models
        self._batcher, self._trace, self._metrics, self._watchdog = batcher, trace, metrics, watchdog
        self.in_flight: deque[InFlightStep] = deque()
        self.decodes = PendingDecodes(self._collect)
        self.noise = NoiseAhead()
        self.last_plan: Plan | None = None
        self._timing = LaunchTiming()
        self._began = 0.0  # when the device was last known to begin a step

    def due(self) -> float | None:
        """The moment to launch the next step, where that is not at once."""
        step = self.in_flight[0] if len(self.in_flight) == 1 else None
        return self._timing.due(step.key, self._began) if step else None

    def launch_due(self, placements: list[Placement]) -> bool:
        """Launch a step that waited until it was due; returns whether that was possible."""
        if launched := self.launch(placements):
            self._timing.launched(time.perf_counter(), late=self.in_flight[0].completed.done())
        return launched

    def launch(self, placements: list[Placement]) -> bool:
        """Launch a step; returns whether that was possible: not while its images could not be staged."""
        if self._pipeline_of(placements[0].request).lacks_staging(placements):
            if not self.in_flight:
                self.decodes.collect(wait=True)
            return False
        for drawing in [one for one in placements if one.draws_noise]:
            with self._requests.fails_alone(drawing.request):
                drawing.noise.fetch()
        placements = [one for one in placements if one.request.outcome is None]
        return bool(placements) and self._launch_plan(placements)

    def complete(self, *, wait: bool) -> None:
        """Handle the steps that the device has done. Wait for the first if two are in flight, or if asked to."""
        while self.in_flight:
            step = self.in_flight[0]
            if not step.completed.done():
                if not (wait or len(self.in_flight) >= _MAX_IN_FLIGHT):
                    return
                expected = self._models.find(step.batch_key.model).step_times.seconds(step.kind, step.plan.shape.rows)
                with self._trace.span("wait"), self._watchdog.limit(expected, step.plan):
                    step.completed.wait()
            with self._trace.span("complete"):
                self._complete(step)
            self.in_flight.popleft()
            wait = False

    def complete_all(self) -> None:
        """Wait for every step in flight, so that the device computes none."""
        while self.in_flight:
            self.complete(wait=True)

    def forget(self) -> None:
        """Keep nothing of steps that are complete."""
        self.last_plan = None

    def clear(self) -> None:
        self.last_plan = None
        self.in_flight.clear()
        self.decodes.clear()

    def _pipeline_of(self, request: Request) -> Pipeline:
        return self._pipelines[request.params.model]

    def _launch_plan(self, placements: list[Placement]) -> bool:
        first = placements[0].request
        pipeline = self._pipeline_of(first)
        with self._trace.span("plan"):
            plan = self.last_plan = pipeline.plan(placements)
        if not self.in_flight:
            self._began = time.perf_counter()
        kind = kind_of(first.params.size, plan.shape.depth, loras=bool(plan.shape.ranks))
        expected = self._models.find(first.params.model).step_times.seconds(kind, plan.shape.rows)
        try:
            with self._trace.span("launch"), self._watchdog.limit(expected, plan):
                step = pipeline.step(plan)
        except EngineError as error:
            self._requests.fail([placement.request for placement in placements], error)
            return False
        self.in_flight.append(step)
        for finished in step.finished:
            self._requests.owned[finished.request] = finished
            self._batcher.leave(finished.request)
        if step.finished and not step.completed.done():  # where it is done, callers hear of that first
            self._decode(step)
        if coming := [placement.noise for placement in placements if placement.draws_noise]:
            self.noise.begin(coming)
        return True

    def _complete(self, step: InFlightStep) -> None:
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        model = step.batch_key.model
        self._metrics.step(model, step.plan.rows, seconds)
        self._models.find(model).step_times.observe(step.kind, step.plan.shape.rows, seconds)
        self._timing.observe(step.key, seconds)
        self._pipelines[model].observe_guidance(step)
        for request, number, previews in step.moves:
            if request.outcome is None and previews:
                with self._requests.fails_alone(request):
                    request.notify(Stepped(number, request.steps, tuple(map(self._pipelines[model].to_rgb, previews))))
            elif request.outcome is None:
                request.notify(Stepped(number, request.steps))
        for finished in step.finished:
            if finished.request.outcome is None:
                finished.request.finish_stage("denoise")
        self._decode(step)
        for finished in step.finished:
            if isinstance(pending := self._requests.owned.get(finished.request), PendingDecode):
                self.decodes.add(pending)

    def _decode(self, step: InFlightStep) -> None:
        """Launch the decoding of those who finished in `step`, behind it, unless that is done."""
        owned = [self._requests.owned.get(finished.request) for finished in step.finished]
        if finished := [one for one in owned if isinstance(one, Finished) and one.request.outcome is None]:
            requests = [one.request for one in finished]
            with self._requests.fails_alone(*requests), self._trace.span("decode"), self._requests.limit_of(*requests):
                for pending in self._pipelines[step.batch_key.model].decode(finished, step.completed):
                    self._requests.owned[pending.request] = pending

    def _collect(self, pending: PendingDecode) -> None:
        with self._trace.span("collect"), self._requests.limit_of(pending.request):
            outcome = outcome_of(pending)
        pending.request.finish_stage("decode")
        self._requests.finish(pending.request, outcome)
