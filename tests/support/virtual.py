"""An executor in virtual time: its device, clock and waits are simulated, so that no machine slows or speeds it.

Time passes only where the executor waits, or where its own work is said to take some. Engines compute nothing.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

import pytest

from benchmarks.server.null_engine import NullDevice
from engines.backends.device import Buffer, Event, Reader, Stream
from engines.backends.host import HostStream
from engines.contract import Array
from engines.demo import BUNDLE
from engines.manifest import Manifest
from server.requests.context import Caller, RequestContext
from server.requests.request import Event as Heard
from server.requests.schemas import GenerateRequest
from server.runtime import executor, loading, steps
from server.runtime.make import make_runtime
from server.runtime.models import ModelSource
from server.runtime.monitoring import trace as trace_module
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline import warm_up

Seconds = Callable[[str, int], float]  # by the name of a graph, and UNet rows


class Clock:
    """Seconds that pass when somebody waits, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self._coming: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.advance(self.now + seconds)

    def at(self, moment: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._coming, (moment, next(self._numbers), act))

    def advance(self, moment: float, *, until: Callable[[], object] = lambda: False) -> None:
        """Let time pass up to `moment`, or until something that happens makes `until` true."""
        while self._coming and self._coming[0][0] <= moment and not until():
            due, _, act = heapq.heappop(self._coming)
            self.now = max(self.now, due)
            act()
        if not until():
            self.now = max(self.now, moment)

    @property
    def ahead(self) -> float:
        """When something happens next."""
        return self._coming[0][0]


class _Condition:
    """A `threading.Condition` of the only thread there is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._notified = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None: ...

    def notify(self) -> None:
        self._notified = True

    notify_all = notify

    def wait(self, timeout: float | None = None) -> None:
        self._notified = False
        moment = self._clock.ahead if timeout is None else self._clock.now + timeout
        self._clock.advance(moment, until=lambda: self._notified)

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> None:
        end = None if timeout is None else self._clock.now + timeout
        while not predicate() and (end is None or self._clock.now < end):
            self.wait(None if end is None else end - self._clock.now)


class _Event:
    def __init__(self, clock: Clock, at: float) -> None:
        self._clock, self.at = clock, at

    def done(self) -> bool:
        return self._clock.now >= self.at

    def wait(self) -> None:
        self._clock.advance(self.at)

    def seconds_since(self, earlier: Event) -> float:
        return self.at - cast(_Event, earlier).at


class _Reading(_Event):
    def __init__(self, clock: Clock, at: float, values: Array) -> None:
        super().__init__(clock, at)
        self._values = values

    def result(self) -> Array:
        self.wait()
        return self._values


class _Stream(HostStream):
    """Work that takes time: what is launched begins when the stream is done with what came before."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(urgent=False)
        self._clock = clock
        self.free = 0.0  # from when on
        self.idle = self.busy = 0.0  # seconds

    def take(self, seconds: float) -> None:
        begin = max(self.free, self._clock.now)
        self.idle += begin - self.free
        self.busy += seconds
        self.free = begin + seconds

    def read(self, buffer: Buffer, *, at: int | None = None) -> Any:
        return _Reading(self._clock, self.free, super().read(buffer, at=at).result())

    def record(self, *, timed: bool = False) -> Any:
        return _Event(self._clock, max(self.free, self._clock.now) if timed else self.free)

    def follow(self, event: Event) -> None:
        self.free = max(self.free, cast(_Event, event).at)


class _Call:
    def __init__(self, take: Callable[[], None]) -> None:
        self.launch = take


class VirtualDevice(NullDevice):
    """A device whose streams work beside the host, for as long as it is told."""

    def __init__(self, clock: Clock, *, seconds: Seconds, host: Seconds, pads: bool = True) -> None:
        """`seconds` is what a run of a graph takes, and `host` what launching it takes, by its name and UNet rows.

        On a CPU, which does not pad, a launch takes all the time.
        """
        super().__init__()
        self.pads = pads
        self.streams: dict[str, _Stream] = {}
        self._clock, self._seconds, self._host = clock, seconds, host

    def stream(self, name: str, *, urgent: bool = False) -> _Stream:  # noqa: ARG002
        return self.streams.setdefault(name, _Stream(self._clock))

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> Any:
        engine, graph = super().load(path, stream, read=read), path.stem

        def bind(buffers: Mapping[str, Buffer]) -> _Call:
            engine.bind(buffers)
            rows = buffers["timestep"].shape[0] if "timestep" in buffers else 1
            return _Call(partial(self._take, cast(_Stream, stream), graph, rows))

        return SimpleNamespace(bind=bind)

    def _take(self, stream: _Stream, graph: str, rows: int) -> None:
        self._clock.sleep(self._host(graph, rows))
        stream.take(self._seconds(graph, rows))


class VirtualRun:
    """An executor over the demo bundle, from its start to its end in one call."""

    def __init__(
        self, device: Callable[[Clock], VirtualDevice], *, trace: Trace | None = None, models: Sequence[str] = ("demo",)
    ) -> None:
        self.clock = Clock()
        self.device = device(self.clock)
        manifest = Manifest.read(BUNDLE)
        self._runtime = make_runtime(
            [ModelSource(name=name, manifest=manifest, bundle=BUNDLE, backend="onnxruntime") for name in models],
            choose_backend=lambda _on_status, _stopped: "onnxruntime",
            open_device=lambda _backend: self.device,
            max_waiting=1000,
            hang_factor=0,
            trace=trace,
            on_ready=self._begin,
            on_failure=self._fail,
        )
        self._runtime.batcher._changed = cast(Any, _Condition(self.clock))
        self._scenario: Callable[[], None] = self.close
        self._error: Exception | None = None

    def run(self, scenario: Callable[[], None]) -> None:
        """Start, let `scenario` say what arrives when, and work until it has closed the executor."""
        self._scenario = scenario
        with pytest.MonkeyPatch.context() as patch:
            for module in (executor, loading, steps, trace_module, warm_up):
                patch.setattr(module, "time", self.clock)
            self._runtime.executor._run()
        if self._error:
            raise self._error

    def close(self) -> None:
        self._runtime.batcher.close()

    def ask(
        self,
        *,
        steps: int,
        seed: int,
        on_event: Callable[[Heard], None] = lambda _event: None,
        model: str | None = None,
        caller: str = "",
        **fields: Any,
    ) -> None:
        """A request arrives now."""
        body = GenerateRequest(
            prompt=f"{seed} red hearts", seed=seed, num_inference_steps=steps, scheduler="ddim", **fields
        )
        models = self._runtime.models
        intake = (models.find(model) if model else models.default).intake
        context = RequestContext(Caller(caller))
        self._runtime.batcher.submit(intake.request(body, lambda _request, event: on_event(event), context=context))

    def _begin(self) -> None:
        self._scenario()

    def _fail(self, error: Exception) -> None:
        self._error = error
