"""An executor in this process, over any device, with faults that happen when they are due."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from numpy.typing import DTypeLike

from engines.backends.available import engine_path
from engines.backends.device import Buffer, Call, Device, Engine, Reader, Stream
from engines.contract import GraphName
from engines.manifest import Manifest
from server.requests.params import Image
from server.requests.request import Completed, Event, Failed, Outcome, Request, Stepped
from server.requests.schemas import GenerateRequest
from server.runtime.batching.quick_requests import QuickRequests
from server.runtime.make import make_runtime
from server.runtime.models import LoadedModel, ModelSource
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.streams import DecodePriority

SECONDS = 300  # that a test waits for what must come, on a machine that may be busy


class Faulty:
    """A device whose engines do something else before some of their launches. Counting begins when it is armed.

    Everything but that is the device's own.
    """

    def __init__(self, device: Device, manifest: Manifest, backend: str) -> None:
        self._device = device
        self._graphs: dict[str, GraphName] = {
            Path(engine_path(manifest, backend, name)).name: name for name in manifest.graphs
        }
        self._faults: dict[tuple[GraphName, int], Callable[[], None]] = {}
        self.launches: Counter[GraphName] = Counter()
        self.bound: list[GraphName] = []
        self.armed = False
        self.name, self.pads = device.name, device.pads

    def before(self, graph: GraphName, launch: int, act: Callable[[], None]) -> None:
        """Do `act` before the given launch, from 1, of any call of `graph`."""
        self._faults[graph, launch] = act

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> Engine:
        graph = self._graphs.get(path.name, cast(GraphName, path.stem))  # of another model, where it is not there
        return _FaultyEngine(self._device.load(path, stream, read=read), graph, self)

    def stream(self, name: str, *, urgent: bool = False) -> Stream:
        return self._device.stream(name, urgent=urgent)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike, *, purpose: str = "other") -> Buffer:
        return self._device.allocate(shape, dtype, purpose=purpose)

    def end_warm_up(self) -> None:
        self._device.end_warm_up()

    def memory(self) -> Mapping[str, int]:
        return self._device.memory()

    def uncaptured(self) -> Mapping[str, int]:
        return self._device.uncaptured()

    def launching(self, graph: GraphName) -> None:
        if self.armed:
            self.launches[graph] += 1
            self._faults.get((graph, self.launches[graph]), lambda: None)()


class _FaultyEngine:
    def __init__(self, engine: Engine, graph: GraphName, faults: Faulty) -> None:
        self._engine, self._graph, self._faults = engine, graph, faults

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        self._faults.bound.append(self._graph)
        return _FaultyCall(self._engine.bind(buffers), self._graph, self._faults)


class _FaultyCall:
    def __init__(self, call: Call, graph: GraphName, faults: Faulty) -> None:
        self._call, self._graph, self._faults = call, graph, faults

    def launch(self) -> None:
        self._faults.launching(self._graph)
        self._call.launch()


class NoneQuick(QuickRequests):
    """Steps are as full as they can be.

    Whether a tiny model's request is quick depends on what else the machine does; see test_mixed_load.
    """

    def came(self, request: Request, seconds: float) -> None:
        pass


class Asked:
    """A request, and what its caller hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def hear(self, _request: Request, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, Stepped)]

    @property
    def endings(self) -> list[Completed | Failed]:
        return [event for event in self.events if isinstance(event, Completed | Failed)]

    def wait(self, condition: Callable[[], object]) -> None:
        """Until `condition` holds, which is looked at whenever the caller hears something."""
        with self._changed:
            assert self._changed.wait_for(condition, SECONDS), f"waited in vain: {self.events}"

    def outcome(self) -> Completed | Failed:
        self.wait(lambda: self.endings)
        (outcome,) = self.endings
        return outcome

    def images(self) -> tuple[Image, ...]:
        outcome = self.outcome()
        assert isinstance(outcome, Completed), outcome
        return outcome.images

    def outcome_name(self) -> str:
        """The name of the ending, or of its error."""
        outcome = self.outcome()
        return type(outcome.error if isinstance(outcome, Failed) else outcome).__name__


class Running(AbstractContextManager["Running"]):
    """An executor over the engines of `backend` on `device`, from ready until every request has its outcome."""

    def __init__(
        self,
        bundle: Path,
        device: Callable[[], Device],
        *,
        backend: str = "onnxruntime",
        manifest: Manifest | None = None,
        max_waiting: int = 1000,
        hang_factor: float = 0,
        trace: Trace | None = None,
        decode_chunk: int | None = None,
        decode_priority: DecodePriority = "equal",
        others: Sequence[ModelSource] = (),
        model_memory: int | None = None,
    ) -> None:
        self.manifest = manifest or Manifest.read(bundle)
        self.trace = trace or Trace()
        self.failures: list[Exception] = []
        self.ended: list[Asked] = []  # in the order of their endings
        self._started = threading.Event()

        def open_device(_backend: str) -> Device:
            self.device = Faulty(device(), self.manifest, backend)
            return self.device

        source = ModelSource(
            name=self.manifest.name, manifest=self.manifest, bundle=bundle, backend=backend, on_loaded=self._loaded
        )
        self._runtime = make_runtime(
            [source, *others],
            choose_backend=lambda _on_status, _stopped: backend,
            open_device=open_device,
            max_waiting=max_waiting,
            quick=NoneQuick(),
            hang_factor=hang_factor,
            trace=self.trace,
            decode_chunk=decode_chunk,
            decode_priority=decode_priority,
            model_memory=model_memory,
            on_ready=self._ready,
            on_failure=self._failed,
        )
        self.models, self.metrics = self._runtime.models, self._runtime.metrics
        self.batcher, self.executor = self._runtime.batcher, self._runtime.executor
        self.step_times = self.models.default.step_times

    def __enter__(self) -> Self:
        self.executor.start()
        assert self._started.wait(SECONDS), "it neither started nor failed"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.executor.close()

    def request(self, asked: Asked, *, model: str = "", **fields: Any) -> Request:
        body = GenerateRequest(**{"prompt": "a red cat", "seed": 1, **fields})

        def note_ending(_request: Request, event: Event) -> None:
            if isinstance(event, Outcome):
                self.ended.append(asked)

        return self.models.find(model).intake.request(body, note_ending, asked.hear, self.metrics.observe)

    def ask(self, **fields: Any) -> Asked:
        """Submit a request."""
        asked = Asked()
        self.batcher.submit(self.request(asked, **fields))
        return asked

    def wait(self, condition: Callable[[], object]) -> None:
        """Until `condition` holds, which no event tells of."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def metric(self, name: str) -> float:
        """The sum over a metric's labels."""
        lines = (line for line in self.metrics.render().decode().splitlines() if line.split("{")[0].split()[0] == name)
        return sum(float(line.split()[-1]) for line in lines)

    def _loaded(self, loaded: LoadedModel) -> None:
        self.pipeline = loaded.pipeline

    def _ready(self) -> None:
        self.device.armed = True
        self._started.set()

    def _failed(self, error: Exception) -> None:
        self.failures.append(error)
        self._started.set()
