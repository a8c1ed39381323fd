"""The simulated cluster: each arrival ends once, a seed gives the same run, and balancers differ as they should."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.cluster.balancers import BALANCERS, BalancerName
from benchmarks.cluster.cluster import ENDINGS, ClusterRun, Loss, simulate
from benchmarks.cluster.curve import ASSUMED, StepCurve
from benchmarks.cluster.workload import MIX, Workload, bursty, capacity, steady

CURVE = StepCurve.read(ASSUMED)
EVERY_SECOND = capacity(CURVE, MIX)  # requests of one server


def work(load: float, *, size: int, seconds: float = 60, seed: int = 0) -> Workload:
    return steady(load * size * EVERY_SECOND, seconds=seconds, seed=seed)


def endings(run: ClusterRun) -> Counter[str]:
    return Counter(ENDINGS[ending] for ending in run.ending)


@pytest.mark.parametrize("balancer", BALANCERS)
def test_every_arrival_has_one_ending_whatever_is_lost(balancer: BalancerName) -> None:
    losses = (
        Loss(at=10, servers=2, unnoticed=5),
        Loss(at=12, servers=1, unnoticed=0),
        Loss(at=15.5, servers=1, unnoticed=2),
    )
    run = simulate(CURVE, work(1.3, size=6, seconds=90), size=6, balancer=balancer, losses=losses)
    assert (run.ending >= 0).all()  # a second ending raises
    assert {"completed", "refused"} <= endings(run).keys()
    assert (np.isfinite(run.latency) == (run.ending == ENDINGS.index("completed"))).all()


def test_a_request_is_sent_a_second_time_and_not_a_third() -> None:
    once = simulate(CURVE, work(0.5, size=8), size=8, balancer="least open", losses=[Loss(30, 3, 2)])
    assert endings(once).keys() == {"completed"}
    twice = [Loss(30, 2, 0), Loss(30.1, 1, 0)]
    assert endings(simulate(CURVE, work(0.8, size=4), size=4, balancer="least open", losses=twice))["lost"] > 0


def test_without_servers_requests_are_lost_and_not_forgotten() -> None:
    run = simulate(CURVE, work(0.5, size=2), size=2, balancer="power of two", losses=[Loss(20, 2, 1)])
    assert endings(run)["lost"] > 0
    assert (run.ending >= 0).all()


def test_a_seed_gives_the_same_run_again() -> None:
    def run(seed: int) -> ClusterRun:
        return simulate(CURVE, work(0.8, size=8, seed=seed), size=8, balancer="power of two", seed=seed)

    assert run(1).latency.tolist() == run(1).latency.tolist()
    assert run(1).latency.tolist() != run(2).latency.tolist()


def test_where_requests_differ_the_balancer_that_looks_is_better() -> None:
    def p99(balancer: BalancerName) -> float:
        return float(np.percentile(simulate(CURVE, work(0.85, size=8), size=8, balancer=balancer).slowdown, 99))

    assert p99("least open") < p99("round robin") / 1.5
    assert p99("least open") <= p99("power of two") * 1.05
    assert p99("round robin") < p99("random")


def test_bursts_have_the_same_mean_rate_and_a_longer_tail() -> None:
    smooth, bursts = (made(0.7 * 8 * EVERY_SECOND, seconds=400, seed=2) for made in (steady, bursty))
    assert len(bursts.at) == pytest.approx(len(smooth.at), rel=0.05)
    tails = [
        np.percentile(simulate(CURVE, one, size=8, balancer="least open").slowdown, 99) for one in (smooth, bursts)
    ]
    assert tails[1] > 1.2 * tails[0]
