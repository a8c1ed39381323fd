"""OpenTelemetry spans of requests, sent to a collector. Needs the extra `otel`; nothing imports it unless it is on.

The spans of a request are made when it ends, from the times of its stages. No span has a prompt.
"""

from __future__ import annotations

import threading
import time
from weakref import WeakKeyDictionary

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.requests.request import Event, Failed, Outcome, Request
from server.version import VERSION

_SECOND = 10**9  # nanoseconds
_CLOSE_SECONDS = 1.0  # that the end of the process waits for the collector


class Spans:
    """A server span for every accepted request, which continues the caller's trace, with a child for each stage.

    A thread of the SDK sends them in batches; if its queue is full they are lost. Nothing waits for the collector.
    """

    def __init__(self, endpoint: str, *, exporter: SpanExporter | None = None) -> None:
        """`endpoint` is the collector's URL, without /v1/traces.

        The SDK's own variables, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and more, apply.
        """
        named = Resource({"service.name": "latentd", "service.version": VERSION})
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = exporter or OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("latentd")
        self._begun: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # nanoseconds since 1970
        self._roots: WeakKeyDictionary[Request, Span] = WeakKeyDictionary()  # of requests whose files may yet be made

    def begin(self, request: Request) -> None:
        """Note when `request` begins."""
        self._begun[request] = time.time_ns()

    def observe(self, request: Request, event: Event) -> None:
        """Make the spans of a request that has ended: a listener of every accepted request."""
        if not isinstance(event, Outcome):
            return
        at, end = self._begun[request], time.time_ns()
        root = self._tracer.start_span(
            "generate",
            context=_parent(request),
            kind=SpanKind.SERVER,
            attributes=_attributes(request),
            start_time=at,
        )
        self._roots[request] = root
        for stage, seconds in tuple(request.timings.items()):
            self._child(root, stage, at, at := at + _nanoseconds(seconds))
        if isinstance(event, Failed):
            root.set_attribute("error.type", type(event.error).__name__)
            root.set_status(Status(StatusCode.ERROR))
        root.end(end)

    def image(self, request: Request, seconds: float) -> None:
        """Add the span of encoding image files, which has just ended."""
        if root := self._roots.get(request):
            end = time.time_ns()
            self._child(root, "image", end - _nanoseconds(seconds), end)

    def close(self) -> None:
        """Send what is left, in a second at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _child(self, root: Span, name: str, start: int, end: int) -> None:
        self._tracer.start_span(name, context=set_span_in_context(root), start_time=start).end(end)


def _attributes(request: Request) -> dict[str, str | int]:
    params = request.params
    return {
        "latentd.request_id": request.id,
        "latentd.api": request.context.api,
        "latentd.priority": request.priority,
        "latentd.model": params.model,
        "latentd.size": str(params.size),
        "latentd.scheduler": params.scheduler.name,
        "latentd.steps": request.steps,
        "latentd.steps_taken": request.step,
        "latentd.images": request.images,
        "latentd.rows": request.rows,
    }


def _parent(request: Request) -> Context | None:
    """The caller's span, if `traceparent` is valid (W3C Trace Context)."""
    given = request.context.traceparent
    return TraceContextTextMapPropagator().extract({"traceparent": given}) if given else Context()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * _SECOND)
