"""What operators read at `/metrics`, in Prometheus' conventions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engines.backends.available import precision_of
from engines.manifest import Manifest
from server.requests.context import APIS
from server.requests.depths import Cache
from server.requests.errors import STATUS, BrokenPicture, Cancelled, ContentBlocked, ServerError, StepFailed
from server.requests.request import Completed, Event, Failed, Outcome, Request, Stage
from server.runtime.batching.step_times import StepTimeModel

_STAGES: tuple[Stage | Literal["image"], ...] = (*get_args(Stage), "image")  # the last is making files of pixels
_OUTCOMES = ("completed", "failed", "cancelled", "blocked")
_FAILURES = (StepFailed, BrokenPicture, ContentBlocked)  # of accepted requests: outcomes, and no reasons to reject
_REASONS = tuple(error.__name__ for error in STATUS if error not in _FAILURES)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _Model(Protocol):
    """What metrics read of a model."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def memory(self) -> int: ...

    @property
    def step_times(self) -> StepTimeModel: ...


class _StepMetrics(NamedTuple):
    """Those of one model's steps: looked up once, not for every step."""

    steps: Counter
    rows: Histogram
    seconds: Histogram


class Metrics:
    """The metrics of one server, in a registry of its own, so that a process may hold several."""

    def __init__(self, *, max_rows: int, models: Sequence[str] = ()) -> None:
        """Steps take at most `max_rows`; `models` are the names of those in the server."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # this process's memory and processor time, where the system tells
        self._requests = Counter(
            "latentd_requests", "Accepted requests by outcome.", ["api", "outcome", "model"], registry=registry
        )
        self._rejected = Counter(
            "latentd_requests_rejected", "Requests rejected before they were queued.", ["reason"], registry=registry
        )
        # Every series exists from the start, so that a rate sees the first event too.
        for ended in product(APIS, _OUTCOMES, models):
            self._requests.labels(*ended)
        self._degraded = Counter(
            "latentd_requests_degraded",
            "Accepted requests whose cache was raised under load, by what it was raised to.",
            ["cache"],
            registry=registry,
        )
        for cache in get_args(Cache)[1:]:
            self._degraded.labels(cache)
        for reason in _REASONS:
            self._rejected.labels(reason)
        self._duration = Histogram(
            "latentd_request_duration_seconds", "Time from acceptance to outcome.", buckets=_SECONDS, registry=registry
        )
        stage = Histogram(
            "latentd_stage_duration_seconds", "Time per stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._stages = {name: stage.labels(name) for name in _STAGES}  # looked up once, not for every request
        rows = tuple(range(1, max_rows + 1))
        step_rows = Histogram("latentd_step_rows", "UNet rows per step.", ["model"], buckets=rows, registry=registry)
        step_seconds = Histogram(
            "latentd_step_duration_seconds", "Time per step.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._lookups = Counter(
            "latentd_prompt_lookups",
            "Prompt chunks looked up, by whether their embeddings were cached.",
            ["result"],
            registry=registry,
        )
        for result in ("hit", "miss"):
            self._lookups.labels(result)
        self._lora_lookups = Counter(
            "latentd_lora_lookups",
            "LoRAs that requests needed, by whether the device held them; others were loaded.",
            ["model", "result"],
            registry=registry,
        )
        for model, result in product(models, ("hit", "miss")):
            self._lora_lookups.labels(model, result)
        self._lora_ranks = Gauge(
            "latentd_lora_ranks_used", "Ranks of the LoRA pool that requests use.", ["model"], registry=registry
        )
        self._broken = Counter(
            "latentd_broken_pictures",
            "Requests that failed because an image had NaN or infinity.",
            registry=registry,
        )
        self._images = Counter("latentd_images", "Images generated.", registry=registry)
        self._flagged = Counter(
            "latentd_images_flagged",
            "Images that the safety checker flagged, sent or blocked.",
            registry=registry,
        )
        steps = Counter("latentd_steps", "Denoising steps run.", ["model"], registry=registry)
        self._by_model = {
            name: _StepMetrics(steps.labels(name), step_rows.labels(name), step_seconds.labels(name)) for name in models
        }
        self._info = Gauge(
            "latentd_model_info", "The model served.", ["model", "backend", "precision"], registry=registry
        )

    def watch(self, gauges: Mapping[str, tuple[str, Callable[[], float]]], models: Collection[_Model]) -> None:
        """Add gauges that are read at every scrape: by name a description and a reader; and what `models` say."""
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=self._registry).set_function(read)
        self._registry.register(_Curves(models))
        self._registry.register(_LoadedModels(models))

    def watch_captures(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Add a gauge of the calls that run without a CUDA graph, which `read` counts by engine at every scrape."""
        self._registry.register(_UncapturedCalls(read))

    def add_collector(self, collector: Collector) -> None:
        """Add metrics that are read at every scrape."""
        self._registry.register(collector)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read at every scrape."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def add_counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a counter that is read at every scrape; `name` without `_total`."""
        self._registry.register(_ReadCounter(name, text, read))

    def set_model(self, name: str, manifest: Manifest, backend: str) -> None:
        """Describe a model that is loaded."""
        self._info.labels(name, backend, precision_of(manifest, backend)).set(1)

    def step(self, model: str, rows: int, seconds: float) -> None:
        of = self._by_model[model]
        of.steps.inc()
        of.rows.observe(rows)
        of.seconds.observe(seconds)

    def stage(self, stage: Stage | Literal["image"], seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def prompt_lookup(self, found: bool) -> None:
        self._lookups.labels("hit" if found else "miss").inc()

    def lora_lookup(self, model: str, found: bool) -> None:
        self._lora_lookups.labels(model, "hit" if found else "miss").inc()

    def lora_ranks(self, model: str, used: int) -> None:
        """Set how many ranks of the model's LoRA pool are in use."""
        self._lora_ranks.labels(model).set(used)

    def accepted(self, request: Request) -> None:
        if request.params.raised_from is not None:
            self._degraded.labels(request.params.cache).inc()

    def rejected(self, error: ServerError) -> None:
        self.refused(type(error).__name__)

    def refused(self, reason: str) -> None:
        """Count a request that was rejected for `reason`."""
        self._rejected.labels(reason).inc()

    def declare_rejection(self, reason: str) -> None:
        """Have a series for `reason` from the start."""
        self._rejected.labels(reason)

    def observe(self, request: Request, event: Event) -> None:
        """Count outcomes: a listener of every accepted request."""
        if not isinstance(event, Outcome):
            return
        self._requests.labels(request.context.api, _outcome(event), request.params.model).inc()
        self._duration.observe(sum(request.timings.values()))
        for stage, seconds in tuple(request.timings.items()):
            self.stage(stage, seconds)
        if isinstance(event, Failed) and isinstance(event.error, BrokenPicture):
            self._broken.inc()
        if isinstance(event, Failed) and isinstance(event.error, ContentBlocked):
            self._flagged.inc(len(event.error.seeds))
        if isinstance(event, Completed):
            self._images.inc(len(event.images))
            self._flagged.inc(sum(event.flagged or ()))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _ReadCounter(Collector):
    """A counter that somebody else keeps."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class _UncapturedCalls(Collector):
    """How many calls run without a CUDA graph, by engine."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "latentd_uncaptured_calls",
            "Calls that run slower, without a CUDA graph, as they could not be captured.",
            labels=["engine"],
        )
        for engine, count in self._read().items():
            family.add_metric([engine], count)
        yield family


class _Curves(Collector):
    """The step-time models as a gauge, read at every scrape."""

    def __init__(self, models: Collection[_Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "latentd_step_time_estimate_seconds",
            "What a step takes, a moving average, from which Retry-After is estimated.",
            labels=["model", "size", "depth", "rows"],
        )
        for model in self._models:
            for (size, depth), curve in model.step_times.curves().items():
                for rows, seconds in curve.items():
                    family.add_metric([model.name, str(size), depth, str(rows)], seconds)
        yield family


class _LoadedModels(Collector):
    """Which models are loaded, and what memory they take, read at every scrape."""

    def __init__(self, models: Collection[_Model]) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        loaded = GaugeMetricFamily("latentd_model_loaded", "1 while requests for it are accepted.", labels=["model"])
        memory = GaugeMetricFamily(
            "latentd_model_memory_bytes",
            "What a loaded model takes: its files and pools, or what the device counts where that is more.",
            labels=["model"],
        )
        for model in self._models:
            loaded.add_metric([model.name], float(model.state == "ready"))
            memory.add_metric([model.name], model.memory)
        yield loaded
        yield memory


def _outcome(outcome: Outcome) -> str:
    if isinstance(outcome, Completed):
        return "completed"
    if isinstance(outcome.error, ContentBlocked):
        return "blocked"
    return "cancelled" if isinstance(outcome.error, Cancelled) else "failed"
