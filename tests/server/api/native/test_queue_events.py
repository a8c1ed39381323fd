"""The event stream of a request that waits: its position, and how long that may take."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from engines.demo import BUNDLE
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

LONG = {"prompt": "a red heart", "num_inference_steps": 200, "num_images": 4}


def post(serving: Serving, accept: str, **fields: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(serving.client.base_url.host, serving.client.base_url.port, timeout=60)
    headers = {"Content-Type": "application/json", "Accept": accept}
    connection.request("POST", "/generate", json.dumps(fields), headers)
    return connection


def queued(connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
    response = connection.getresponse()
    while line := response.readline().decode():
        if line.strip() == "event: queued":
            yield json.loads(response.readline().decode().removeprefix("data: "))


def test_a_waiting_request_hears_of_its_position_whenever_that_changes() -> None:
    with HeldServing(BUNDLE) as serving, ExitStack() as stack, serving.held():
        before = [stack.enter_context(closing(post(serving, "application/json", **LONG))) for _ in range(8)]
        serving.wait_for(8)
        serving.let(20)  # whose times the estimate is made of
        events = queued(stack.enter_context(closing(post(serving, "text/event-stream", **LONG))))
        first = next(events)
        assert first["position"] > 2
        assert first["estimate_s"] > 0
        before[-1].close()
        before[-2].close()
        serving.let(60)
        second = next(events)
        assert second["position"] < first["position"]
        assert second["estimate_s"] > 0  # step times are measured on: fewer steps may be slower ones
        assert second["id"] == first["id"]
