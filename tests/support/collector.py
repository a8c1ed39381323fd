"""A collector of traces: the receiving end of OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


class Collector:
    """Receives spans. A context manager."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self._resources: list[ResourceSpans] = []
        self._arrived = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, wanted: Callable[[Span], bool], *, seconds: float = 60) -> Span:
        """Wait for a span; returns it."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(map(wanted, self.spans)), seconds), self.spans
            return next(filter(wanted, self.spans))

    @property
    def spans(self) -> list[Span]:
        return [span for one in tuple(self._resources) for scope in one.scope_spans for span in scope.spans]

    @property
    def service(self) -> str:
        """The name that the sender gives itself."""
        attributes = self._resources[0].resource.attributes
        return next(str(one.value.string_value) for one in attributes if one.key == "service.name")

    def _receive(self, body: bytes) -> None:
        with self._arrived:
            self.bodies.append(body)
            self._resources.extend(ExportTraceServiceRequest.FromString(body).resource_spans)
            self._arrived.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receive = self._receive

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                receive(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
