"""A server without HTTP, in this process: its executor, and callers of three kinds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.policies import SwitchablePolicy
from benchmarks.spans import TraceSpan, Window, read_trace
from engines.backends.available import check_fits
from engines.backends.device import Device
from engines.backends.registry import open_device
from engines.errors import EngineError
from engines.manifest import Manifest
from loadtest.arrivals import Arrival
from server.requests.errors import BrokenPicture, Cancelled, NotReady
from server.requests.params import Image
from server.requests.request import Completed, Event, Failed, Request
from server.requests.schemas import GenerateRequest
from server.runtime.make import make_runtime
from server.runtime.models import ModelSource
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.streams import DecodePriority

_HANG_FACTOR = 20  # as in the server's settings
_MAX_WAITING = 100_000  # no request is rejected
_POLL = 1.0  # seconds between checks of the executor
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over."""

    number: int
    at: float  # on perf_counter's clock
    whole: bool  # with a picture, sound or not; the others were cancelled


@dataclass(frozen=True, slots=True)
class Drawn:
    """An image that was asked for."""

    number: int  # of the request, in the order in which they were asked for
    request: Request
    image: Image


@dataclass(frozen=True, slots=True)
class Saturated:
    """What a full pipeline did."""

    moments: tuple[float, ...]  # at which pictures were done, on perf_counter's clock

    @property
    def window(self) -> Window:
        return self.moments[0], self.moments[-1]


class Served:
    """A bundle under its executor. A context manager; raises EngineError where it does not start, or fails."""

    def __init__(
        self,
        bundle: Path,
        backend: str,
        *,
        threads: int = 0,
        decode_priority: DecodePriority = "equal",
        trace: Path | None = None,
        device: Callable[[], Device] | None = None,
    ) -> None:
        """`device` opens another one than the backend's, for the same bundle."""
        self.manifest = manifest = Manifest.load(bundle)
        check_fits(manifest, backend, bundle)
        self.policy = SwitchablePolicy()
        self.rows_per_image = 1 if manifest.embeds_guidance else 2
        self.broken = 0
        self._traced = trace
        self._trace = Trace(trace, seconds=float("inf"))
        self._numbers = count()
        self._started = threading.Event()
        self._failed = threading.Event()
        self._failure: Exception | None = None
        self._open: set[Request] = set()

        self._runtime = make_runtime(
            [ModelSource(name=manifest.name, manifest=manifest, bundle=bundle, backend=backend)],
            choose_backend=lambda _on_status, _stopped: backend,
            open_device=lambda name: device() if device else open_device(name, threads=threads),
            max_waiting=_MAX_WAITING,
            hang_factor=_HANG_FACTOR,
            line=self.policy,
            trace=self._trace,
            decode_priority=decode_priority,
            on_ready=self._on_ready,
            on_failure=self._on_failure,
        )
        self.batcher, self._model = self._runtime.batcher, self._runtime.models.default
        self.step_times = self._model.step_times

    def __enter__(self) -> Self:
        self._runtime.executor.start()
        self._started.wait()
        try:
            self._check()
        except EngineError:
            self._runtime.executor.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.batcher.cancel()
        self._runtime.executor.close()

    def draw(self, steps: int) -> float:
        """Ask for one picture, and wait for it: the seconds that took."""
        ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        began = time.perf_counter()
        self._submit(steps, 0, ended)
        return self._next(ended).at - began

    def draw_all(self, bodies: Sequence[GenerateRequest]) -> Iterator[Drawn]:
        """Ask for an image of each body at once: the images, as they are done. Raises EngineError, InvalidRequest."""
        ended: queue.SimpleQueue[tuple[int, Request, Completed | Failed]] = queue.SimpleQueue()

        def listener(number: int) -> Callable[[Request, Event], None]:
            return lambda request, event: (
                ended.put((number, request, event)) if isinstance(event, Completed | Failed) else None
            )

        for number, body in enumerate(bodies):
            self.batcher.submit(self._model.intake.request(body, listener(number)))
        for _ in bodies:
            number, request, outcome = self._wait_for(ended)
            if isinstance(outcome, Failed):
                raise EngineError(f"A request failed: {outcome.error}") from outcome.error
            yield Drawn(number, request, outcome.images[0])

    @property
    def rows(self) -> float:
        """UNet rows of all steps so far."""
        text = self._runtime.metrics.render().decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "latentd_step_rows_sum")

    def saturate(self, rows: int, steps: Iterator[int], *, seconds: float) -> Saturated:
        """Keep steps of at most `rows` full for `seconds`, and until four images are done. As many wait as run.

        The first requests take more steps, each another count, as those of a busy server are at different steps. None
        takes fewer: the batcher would keep steps brief for it.
        """
        images = max(rows // self.rows_per_image, 1)
        ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self.batcher.set_max_rows(self._model.name, rows)
        asked = [self._submit(next(steps) * (images + index) // images, 0, ended) for index in range(images)]
        asked += [self._submit(next(steps), 0, ended) for _ in range(images)]
        moments: list[float] = []
        while len(moments) < 4 or moments[-1] < moments[0] + seconds:
            moments.append(self._next(ended).at)
            asked.append(self._submit(next(steps), 0, ended))
        self._dismiss(asked)
        self.batcher.set_max_rows(self._model.name, self.manifest.max_rows)
        return Saturated(tuple(moments))

    def replay(self, arrivals: Sequence[Arrival], *, rows: int, by_request: bool) -> tuple[float, ...]:
        """Submit requests when they are due (open loop): the seconds from then to each image."""
        ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self.batcher.set_max_rows(self._model.name, rows)
        self.policy.by_request = by_request
        start = time.perf_counter()
        for number, arrival in enumerate(arrivals):
            time.sleep(max(start + arrival.at - time.perf_counter(), 0))
            self._submit(arrival.steps, number, ended)
        done = {end.number: end.at for end in (self._next(ended) for _ in arrivals)}
        self.batcher.set_max_rows(self._model.name, self.manifest.max_rows)
        self.policy.by_request = False
        return tuple(done[number] - start - arrival.at for number, arrival in enumerate(arrivals))

    def take_spans(self) -> tuple[TraceSpan, ...]:
        """What was traced since the start; from here on nothing is. Times are on perf_counter's clock."""
        if self._traced is None:
            return ()
        self._rest()
        self._trace.close()
        began = self._trace.began
        return tuple(
            TraceSpan(span.track, span.name, span.begin + began, span.end + began) for span in read_trace(self._traced)
        )

    def _submit(self, steps: int, number: int, ended: queue.SimpleQueue[Ended]) -> Request:
        def on_event(request: Request, event: Event) -> None:
            if isinstance(event, Completed | Failed):
                self._open.discard(request)
                ended.put(Ended(number, time.perf_counter(), self._whole(event)))

        unique = next(self._numbers)  # a prompt of its own has to be encoded
        body = GenerateRequest(
            prompt=f"a photograph of {unique} lighthouses on a rock in the sea",
            num_inference_steps=steps,
            guidance_scale=7.5,
            scheduler="lcm" if self.manifest.embeds_guidance else "ddim",
            seed=unique,
        )
        request = self._model.intake.request(body, on_event)
        self._open.add(request)
        try:
            self.batcher.submit(request)
        except NotReady as error:  # the executor has ended, and says why
            self._failure = self._failure or error
            self._check()
        return request

    def _whole(self, event: Completed | Failed) -> bool:
        """Count pictures that are not finite: they took as long as others, and random weights may make them."""
        if isinstance(event, Completed):
            return True
        if isinstance(event.error, BrokenPicture):
            self.broken += 1
            return True
        if not isinstance(event.error, Cancelled):
            self._failure = self._failure or event.error
        return False

    def _next(self, ended: queue.SimpleQueue[Ended]) -> Ended:
        """Wait for the next request to end. Raises EngineError if the executor fails."""
        end = self._wait_for(ended)
        if not end.whole:
            self._check()
        return end

    def _wait_for(self, ended: queue.SimpleQueue[_T]) -> _T:
        """Wait for the next of `ended`. Raises EngineError if the executor fails."""
        while True:
            try:
                return ended.get(timeout=_POLL)
            except queue.Empty:
                self._check()

    def _dismiss(self, requests: Sequence[Request]) -> None:
        """Take back what was asked for, and return when nothing is under way."""
        for request in requests:
            request.cancel()
        self._rest()

    def _rest(self) -> None:
        """Return when the executor has nothing to do."""
        while self._open:
            self._check()
            time.sleep(0.01)
        time.sleep(0.05)  # for the last words of its loop

    def _check(self) -> None:
        if isinstance(self._failure, NotReady):  # what requests hear; the reason follows
            self._failed.wait(timeout=_POLL)
        if self._failure:
            raise EngineError(f"The executor failed: {self._failure}") from self._failure

    def _on_ready(self) -> None:
        self._started.set()

    def _on_failure(self, error: Exception) -> None:
        self._failure = error
        self._failed.set()
        self._started.set()
