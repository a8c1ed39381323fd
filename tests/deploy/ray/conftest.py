"""A cluster of three nodes on loopback addresses, with latentd on it: one for each module that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cluster.ray_cluster import Cluster, configuration
from engines.demo import BUNDLE as DEMO


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head, without replicas, and two nodes with a replica each. Leave it as you found it."""
    with Cluster(3) as running:
        running.deploy(configuration(DEMO, replicas=2), replicas=2)
        yield running
