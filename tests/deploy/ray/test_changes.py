"""Nodes and replicas that come and go under load: no request is lost."""

from __future__ import annotations

import pytest

from benchmarks.cluster.ray import kill_node, scale
from benchmarks.cluster.ray_cluster import Cluster, configuration
from engines.demo import BUNDLE as DEMO

pytestmark = pytest.mark.faults  # minutes of load, on nodes that are killed


def test_scaling_up_and_down_loses_nothing_and_refuses_nothing(cluster: Cluster) -> None:
    cluster.deploy(configuration(DEMO, replicas=1), replicas=1)
    change = scale(cluster, 2, 1, seconds=5)
    assert change.lost == []
    assert set(change.ends) == {"done"}


def test_a_node_that_is_killed_costs_retries_and_loses_nothing(cluster: Cluster) -> None:
    cluster.deploy(configuration(DEMO, replicas=2), replicas=2)
    change = kill_node(cluster, seconds=5)
    assert change.lost == []
    assert change.ends.get("retried", 0) + change.ends.get("broken off", 0) > 0
    assert change.seconds_to_recover is not None
    assert change.seconds_to_recover < 60
