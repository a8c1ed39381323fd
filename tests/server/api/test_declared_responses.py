"""A few requests to each operation of the OpenAPI document: `tests/faults/test_openapi.py` sends many."""

from __future__ import annotations

from tests.support.fuzzing import check_operations
from tests.support.serving import Serving


def test_responses_are_as_the_document_says(serving: Serving) -> None:
    assert "/generate" in check_operations(serving.url, examples=5)
