"""What the OpenAPI document allows and forbids: no 5xx, and responses as it declares them."""

from __future__ import annotations

from engines.demo import BUNDLE as DEMO
from tests.support.fuzzing import check_operations
from tests.support.serving import Serving


def test_responses_are_as_the_document_says() -> None:
    with Serving(DEMO) as serving:
        paths = check_operations(serving.url, examples=60)
        assert {"/generate", "/models", "/v2/health/ready"} <= paths
        assert serving.client.get("/v2/health/live").status_code == 200
        assert not serving.total("latentd_requests_total", api="generate", outcome="failed")
