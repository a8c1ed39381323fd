"""What becomes of requests when nodes of a Ray cluster come and go, and the latency that Ray adds.

A cluster of three nodes on this machine, with CPU replicas of the demo's model. The times are those of this machine,
which all nodes share; the counts are what a cluster shows too.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import httpx
from pydantic import Field

from benchmarks.cluster.ray_cluster import Cluster, configuration
from benchmarks.cluster.ray_load import Load, recovery
from benchmarks.process import ServerProcess, server_command
from engines.cli import CommandLine, parse
from engines.demo import BUNDLE as DEMO
from loadtest.provenance import ResultModel

_STEADY = 10.0  # seconds of load before and after a change
_CLIENTS = 6
_BODY = {"prompt": "a red heart on a yellow background", "seed": 7}


class Command(CommandLine):
    """Measure what becomes of requests when nodes of a Ray cluster come and go, and the latency that Ray adds."""

    out: Path = Field(description="JSON file to write")
    requests: int = Field(200, ge=10, le=10_000, description="requests to each of two servers, for the latency")


class Change(ResultModel):
    """What became of the requests of a load during which replicas came or went."""

    requests: int
    ends: dict[str, int]
    lost: list[str]  # what each lost request got
    seconds_to_recover: float | None = None  # until a request of each client in a row was done at the first attempt


class Latency(ResultModel):
    """Milliseconds of requests that were sent to two servers in turn, one at a time."""

    requests: int
    direct_p50: float
    ray_p50: float
    added_p50: float


class RayResults(ResultModel):
    """What the command writes."""

    ray: str  # the version
    nodes: int
    latency: Latency
    scaled: Change  # from one replica to two, one and two
    node_killed: Change


def kill_node(cluster: Cluster, *, seconds: float = _STEADY, recover_seconds: float = 60.0) -> Change:
    """End a node with a replica at once, under load through the head, and wait until another one replaces it."""
    with Load(cluster.url, _CLIENTS) as load:
        time.sleep(seconds)
        dying = next(node for node in cluster.nodes[:0:-1] if node.replicas)
        at = time.monotonic()
        dying.kill()
        cluster.nodes.remove(dying)
        while recovery(load.requests, at, clients=_CLIENTS) == math.inf and time.monotonic() < at + recover_seconds:
            time.sleep(0.5)
        time.sleep(seconds)
    return _change(load, recovery(load.requests, at, clients=_CLIENTS))


def scale(cluster: Cluster, *counts: int, seconds: float = _STEADY) -> Change:
    """Deploy each of these numbers of replicas in turn, under load."""
    with Load(cluster.url, _CLIENTS) as load:
        for count in counts:
            cluster.deploy(configuration(DEMO, replicas=count), replicas=count)
            time.sleep(seconds)
    return _change(load)


def added_latency(ray_url: str, direct_url: str, requests: int) -> Latency:
    """The latency of one request at a time, sent to both in turn."""
    taken: dict[str, list[float]] = {direct_url: [], ray_url: []}
    with httpx.Client(timeout=120, trust_env=False) as client:
        for url in [direct_url, ray_url] * (requests + 3):
            began = time.perf_counter()
            client.post(f"{url}/generate", json=_BODY).raise_for_status()
            taken[url].append(time.perf_counter() - began)
    direct, through_ray = (statistics.median(taken[url][3:]) * 1000 for url in (direct_url, ray_url))
    return Latency(
        requests=requests,
        direct_p50=round(direct, 2),
        ray_p50=round(through_ray, 2),
        added_p50=round(through_ray - direct, 2),
    )


def main(argv: Sequence[str] | None = None) -> int:
    command = parse(Command, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.cluster.ray")
    with Cluster(3) as cluster:
        cluster.deploy(configuration(DEMO, replicas=1), replicas=1)
        with ServerProcess(server_command("--bundle", str(DEMO), "--threads", "1", "--port", "0")) as direct:
            latency = added_latency(cluster.url, direct.url, command.requests)
        scaled = scale(cluster, 2, 1, 2)
        killed = kill_node(cluster)
    results = RayResults(ray=version("ray"), nodes=3, latency=latency, scaled=scaled, node_killed=killed)
    text = results.model_dump_json(indent=2)
    command.out.write_text(f"{text}\n")
    sys.stdout.write(f"{text}\n")
    return 1 if scaled.lost or killed.lost else 0


def _change(load: Load, seconds_to_recover: float | None = None) -> Change:
    lost = [request.detail for request in load.requests if request.end == "lost"]
    seconds = None if seconds_to_recover is None else round(seconds_to_recover, 2)
    return Change(requests=len(load.requests), ends=load.counts(), lost=lost, seconds_to_recover=seconds)


if __name__ == "__main__":
    sys.exit(main())
