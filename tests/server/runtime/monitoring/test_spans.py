"""Traces, received by a collector from a running server."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from engines.demo import BUNDLE
from tests.support.collector import Collector
from tests.support.serving import Serving
from tests.test_import_plan import loaded

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASKED = {"prompt": "zweihundert", "negative_prompt": "zweihundert", "num_inference_steps": 2, "scheduler": "euler"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def serving(collector: Collector) -> Iterator[Serving]:
    environment = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with Serving(BUNDLE, "--otlp-endpoint", collector.url, environment=environment) as running:
        yield running


def generate(serving: Serving, request_id: str, **headers: str) -> None:
    answer = serving.client.post("/generate", json=ASKED, headers={"X-Request-Id": request_id, **headers})
    assert answer.status_code == 200


def attributes(span: Span) -> dict[str, str | int]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def trace_of(collector: Collector, request_id: str) -> tuple[Span, list[Span]]:
    """The span of a request, when it has arrived, and its children in order."""
    root = collector.wait_for(lambda span: attributes(span).get("latentd.request_id") == request_id)
    children = [span for span in collector.spans if span.parent_span_id == root.span_id]
    return root, sorted(children, key=lambda span: span.start_time_unix_nano)


def test_a_request_continues_the_trace_of_its_caller(serving: Serving, collector: Collector) -> None:
    began = time.time_ns()
    generate(serving, "continued", traceparent=f"00-{TRACE}-{PARENT}-01")
    collector.wait_for(lambda span: span.name == "image")
    root, children = trace_of(collector, "continued")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert root.kind == Span.SPAN_KIND_SERVER
    assert [span.name for span in children] == ["queue", "encode", "denoise", "decode", "image"]
    assert {span.trace_id.hex() for span in children} == {TRACE}
    assert began <= root.start_time_unix_nano <= children[0].start_time_unix_nano
    for before, after in pairwise(children):
        assert before.start_time_unix_nano <= before.end_time_unix_nano <= after.start_time_unix_nano + 10**6
    assert children[-1].end_time_unix_nano <= time.time_ns()
    assert attributes(root) == {
        "latentd.request_id": "continued",
        "latentd.api": "generate",
        "latentd.priority": "interactive",
        "latentd.model": "latentd-demo",
        "latentd.size": "64x64",
        "latentd.scheduler": "euler",
        "latentd.steps": 2,
        "latentd.steps_taken": 2,
        "latentd.images": 1,
        "latentd.rows": 2,
    }
    assert collector.service == "latentd"


@pytest.mark.parametrize(
    "traceparent",
    ["", "junk", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}", "0" * 5000],
)
def test_an_invalid_traceparent_begins_a_trace(serving: Serving, collector: Collector, traceparent: str) -> None:
    request_id = f"invalid-{len(traceparent)}-{traceparent[:3].strip('-')}"
    generate(serving, request_id, traceparent=traceparent)
    root, _ = trace_of(collector, request_id)
    assert root.parent_span_id == b""
    assert root.trace_id.hex() != TRACE


def test_a_trace_that_is_not_sampled_is_not_sent(serving: Serving, collector: Collector) -> None:
    generate(serving, "unsampled", traceparent=f"00-{TRACE}-{PARENT}-00")
    generate(serving, "sampled")
    trace_of(collector, "sampled")
    assert "unsampled" not in {attributes(span).get("latentd.request_id") for span in collector.spans}


def test_a_request_that_fails_says_why(serving: Serving, collector: Collector) -> None:
    fields = {**ASKED, "num_inference_steps": 200, "timeout_s": 0.05}
    answer = serving.client.post("/generate", json=fields, headers={"X-Request-Id": "late"})
    assert answer.status_code == 504
    root, _ = trace_of(collector, "late")
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert attributes(root)["error.type"] == "DeadlineExceeded"


def test_no_span_has_a_prompt(serving: Serving, collector: Collector) -> None:
    generate(serving, "secret")
    trace_of(collector, "secret")
    assert b"zweihundert" not in b"".join(collector.bodies)


def test_what_is_left_is_sent_at_the_end() -> None:
    with Collector() as collector:
        with Serving(BUNDLE, "--otlp-endpoint", collector.url) as serving:  # batches leave every five seconds
            generate(serving, "last")
            assert serving.stop() == 0
        assert [span.name for span in trace_of(collector, "last")[1]]


def test_a_collector_that_does_not_answer_holds_up_neither_requests_nor_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_BSP_MAX_QUEUE_SIZE": "8"}
        environment["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "4"
        environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "600"
        words = ("--otlp-endpoint", endpoint, "--drain-seconds", "600")
        with Serving(BUNDLE, *words, environment=environment) as serving:
            for number in range(8):
                generate(serving, f"request-{number}")
            assert serving.stop(seconds=200) == 0


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    """FastAPI imports the API of OpenTelemetry where it is installed, and uses it if the process has a provider."""
    parts = ("opentelemetry.sdk", "opentelemetry.exporter", "requests")
    assert not {name for name in loaded("server.app", "server.startup.command") if name.startswith(parts)}
