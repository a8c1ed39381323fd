"""Requests that the OpenAPI document allows and forbids, made by schemathesis; responses are checked against it."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from server.requests.schemas import MAX_TIMEOUT

_MAX_STEPS = 2  # of valid requests, which would otherwise take minutes each
_LIMITS = {
    "num_inference_steps": _MAX_STEPS,
    "steps": _MAX_STEPS,
    **dict.fromkeys(("num_images", "n", "batch_size", "n_iter"), 1),
}
# Not that every valid body is accepted: which values go together, and what the model can do, no schema says.
_CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)


def check_operations(url: str, *, examples: int) -> set[str]:
    """Try every operation with so many requests, the same each time; return their paths."""
    found = list(schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations())
    operations = [one.ok() for one in found if isinstance(one, Ok)]
    assert len(operations) == len(found), "an operation of the document cannot be read"
    for operation in operations:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers_as_declared(case: Any) -> None:
            case.body = _quick(case.body)
            if case.headers and _is_time(case.headers.get("X-Request-Timeout")):
                del case.headers["X-Request-Timeout"]
            case.validate_response(case.call(timeout=60), checks=_CHECKS)

        answers_as_declared()
    return {operation.path for operation in operations}


def _is_time(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 < float(value) <= MAX_TIMEOUT
    except (TypeError, ValueError):
        return False


def _quick(body: Any) -> Any:
    """The body with few steps and one image, where it asks for more validly, and without valid limits of time.

    Those are often shorter than an image takes, which is 504.
    """
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name != "timeout_s" or not _is_time(value)}
        nested = {"parameters": _quick(body["parameters"])} if "parameters" in body else {}
        return body | nested | {name: most for name, most in _LIMITS.items() if _is_more(body.get(name), most)}
    return body


def _is_more(value: Any, most: int) -> bool:
    return type(value) is int and most < value <= 200
