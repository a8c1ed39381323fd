"""What operators read at `/metrics`, in Prometheus' conventions."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engines.manifest import Manifest
from server.errors import Cancelled, ServerError
from server.request import Completed, Event, Failed, Request

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several may live in one process."""

    def __init__(self, manifest: Manifest, backend: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "latentd_requests", "Accepted requests by their ending.", ["api", "outcome"], registry=registry
        )
        self._rejected = Counter(
            "latentd_requests_rejected", "Requests refused before the queue.", ["reason"], registry=registry
        )
        self._duration = Histogram(
            "latentd_request_duration_seconds", "From accepted to ended.", buckets=_SECONDS, registry=registry
        )
        self._stage = Histogram(
            "latentd_stage_duration_seconds", "Time per stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        rows = tuple(range(1, manifest.max_rows + 1))
        self._step_rows = Histogram("latentd_step_rows", "UNet rows per step.", buckets=rows, registry=registry)
        self._step_seconds = Histogram(
            "latentd_step_duration_seconds", "Time per step.", buckets=_SECONDS, registry=registry
        )
        self._lookups = Counter(
            "latentd_prompt_lookups",
            "Chunks of prompts, by whether their embeddings were still there.",
            ["result"],
            registry=registry,
        )
        for result in ("hit", "miss"):  # so that a rate can be drawn from the first on
            self._lookups.labels(result)
        self._images = Counter("latentd_images", "Pictures made.", registry=registry)
        self._steps = Counter("latentd_steps", "Denoising steps run.", registry=registry)
        info = Gauge("latentd_model_info", "The model served.", ["model", "backend", "precision"], registry=registry)
        info.labels(manifest.name, backend, manifest.precision(backend)).set(1)

    def watch(self, *, waiting: Callable[[], float], running: Callable[[], float], ready: Callable[[], float]) -> None:
        """Read these whenever somebody scrapes."""
        for name, text, read in (
            ("latentd_requests_waiting", "Accepted requests that wait for their first step.", waiting),
            ("latentd_requests_running", "Requests that take steps.", running),
            ("latentd_ready", "1 when requests are answered.", ready),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)

    def step(self, rows: int, seconds: float) -> None:
        self._steps.inc()
        self._step_rows.observe(rows)
        self._step_seconds.observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        self._stage.labels(stage).observe(seconds)

    def prompt_lookup(self, found: bool) -> None:
        self._lookups.labels("hit" if found else "miss").inc()

    def rejected(self, error: ServerError) -> None:
        self._rejected.labels(type(error).__name__).inc()

    def observe(self, request: Request, event: Event) -> None:
        """Count an ending: a listener of every accepted request."""
        if not isinstance(event, Completed | Failed):
            return
        self._requests.labels("generate", _outcome(event)).inc()
        self._duration.observe(sum(request.timings.values()))
        for stage, seconds in request.timings.items():
            self.stage(stage, seconds)
        if isinstance(event, Completed):
            self._images.inc(len(event.images))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


def _outcome(ending: Completed | Failed) -> str:
    if isinstance(ending, Completed):
        return "completed"
    return "cancelled" if isinstance(ending.error, Cancelled) else "failed"
