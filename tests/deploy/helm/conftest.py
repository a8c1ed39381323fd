"""A running server, on which the chart relies."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.demo import BUNDLE
from tests.deploy.helm.chart import environment
from tests.support.serving import Serving


@pytest.fixture(scope="session")
def pod_server() -> Iterator[Serving]:
    """The demo in the environment of a trial's pod, but for port and address."""
    variables = {**os.environ, **environment({"mode": "cpu"})}
    with Serving(BUNDLE, "--host", "127.0.0.1", environment=variables) as running:
        yield running


@pytest.fixture(scope="session")
def metric_names(pod_server: Serving) -> set[str]:
    """The names of the series at /metrics."""
    families = text_string_to_metric_families(pod_server.client.get("/metrics").text)
    return {sample.name for family in families for sample in family.samples}
