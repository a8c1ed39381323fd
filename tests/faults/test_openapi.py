"""What the OpenAPI document allows and forbids, tried by schemathesis: no 5xx, and responses as it declares them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok

from engines.demo import BUNDLE as DEMO
from tests.support.serving import Serving

_EXAMPLES = 60  # of each operation
_MAX_STEPS = 2  # of valid requests, which would otherwise take minutes each


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving(DEMO) as serving:
        yield serving


def quick(body: Any) -> Any:
    """The body with few steps and one image, where it asks for more than that validly."""
    if isinstance(body, dict):
        limits = {"num_inference_steps": _MAX_STEPS, "num_images": 1}
        return body | {name: most for name, most in limits.items() if _is_more(body.get(name), most)}
    return body


def _is_more(value: Any, most: int) -> bool:
    return type(value) is int and most < value <= 200


def test_responses_are_as_the_document_says(server: Serving) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert {"/generate", "/models", "/v2/health/ready"} <= {operation.path for operation in operations}
    for operation in operations:

        @settings(
            max_examples=_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers_as_declared(case: Any) -> None:
            case.body = quick(case.body)
            case.validate_response(case.call(timeout=60))

        answers_as_declared()
    assert server.client.get("/v2/health/live").status_code == 200
    assert 'outcome="failed"' not in server.client.get("/metrics").text
