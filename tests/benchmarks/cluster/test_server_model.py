"""The simulated server decides as the server's own batcher does, and queues as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.cluster.cluster import MAX_WAITING, simulate
from benchmarks.cluster.curve import ASSUMED, StepCurve
from benchmarks.cluster.workload import ALIKE, MIX, RequestKind, Workload, capacity, steady
from server.requests.errors import QueueFull
from server.requests.request import Request
from server.runtime.batching.batcher import Batcher
from tests.support.batching import KnownTimes, request

CURVE = StepCurve.read(ASSUMED)


class RealBatcher:
    """The latencies of a workload at one server, by the server's batcher in virtual time."""

    def __init__(self, workload: Workload) -> None:
        seconds = CURVE.by_rows()
        self._workload = workload
        self._batcher = Batcher(max_waiting=MAX_WAITING)
        self._batcher.add("", max_rows=CURVE.max_rows, step_times=KnownTimes(lambda _kind, rows: seconds[rows]))
        self._open: dict[Request, int] = {}
        self._next, self._now = 0, 0.0
        self.latency = np.full(len(workload.at), math.inf)

    def run(self) -> RealBatcher:
        while self._next < len(self._workload.at) or self._open:
            if not self._open:
                self._now = max(self._now, float(self._workload.at[self._next]))
            self._arrive()
            self._step()
        return self

    def _arrive(self) -> None:
        at, kinds = self._workload.at, self._workload.kind
        while self._next < len(at) and at[self._next] <= self._now:
            kind = self._workload.mix[kinds[self._next]]
            made = request(str(self._next), images=kind.images, steps=kind.steps)
            try:
                self._batcher.submit(made)
                self._open[made] = self._next
            except QueueFull:
                pass
            self._next += 1

    def _step(self) -> None:
        batch = self._batcher.next_batch(timeout=0)
        assert batch is not None
        self._now += CURVE.step(sum(one.rows for one in batch.requests))
        for one in batch.requests:
            one.advance()
        done = [one for one in batch.requests if one.denoised]
        for one in done:
            self._batcher.leave(one)
            self._now += CURVE.encode_decode * one.images
        for one in done:
            number = self._open.pop(one)
            self.latency[number] = self._now - self._workload.at[number]


@pytest.mark.parametrize(("load", "tolerance"), [(0.5, 0.01), (0.9, 0.05), (1.1, 0.05)])
def test_one_server_is_as_quick_as_with_the_real_batcher(load: float, tolerance: float) -> None:
    workload = steady(load * capacity(CURVE, MIX), seconds=200, seed=3)
    real = RealBatcher(workload).run().latency
    simulated = simulate(CURVE, workload, size=1, balancer="round robin").latency
    assert np.isinf(simulated).mean() == pytest.approx(np.isinf(real).mean(), abs=0.01)
    ended = [found[np.isfinite(found)] for found in (simulated, real)]
    means, tails = ([figure(one) for one in ended] for figure in (np.mean, lambda one: np.percentile(one, 99)))
    assert means[0] == pytest.approx(means[1], rel=tolerance)
    assert tails[0] == pytest.approx(tails[1], rel=tolerance)


def test_equal_requests_one_at_a_time_wait_as_theory_says() -> None:
    """Pollaczek and Khinchine: the mean wait of M/D/1 is ρ s / 2 (1 - ρ)."""
    second = StepCurve(name="", measured=False, source="", seconds={2: 1.0}, encode_decode=0.0)
    workload = steady(0.7, seconds=40_000, seed=0, mix=(RequestKind(1, steps=1, images=1),))
    found = simulate(second, workload, size=1, balancer="round robin")
    assert found.latency.mean() == pytest.approx(1 + 0.7 / (2 * 0.3), rel=0.03)


def test_requests_that_overlap_share_steps() -> None:
    curve = StepCurve(name="", measured=False, source="", seconds={2: 1.0, 4: 1.5}, encode_decode=0.25)
    kinds = (RequestKind(1, steps=4, images=1),)
    workload = Workload(kinds, np.array([0.0, 1.5]), np.array([0, 0]))
    found = simulate(curve, workload, size=1, balancer="round robin")
    # Two steps alone, two shared, and an image; then two alone, and an image.
    assert found.latency.tolist() == pytest.approx([2 + 2 * 1.5 + 0.25, 5.25 + 2 + 0.25 - 1.5])


def test_a_load_of_one_is_what_full_steps_complete() -> None:
    full = 16 / 2 / (30 * CURVE.step(16) + 8 * CURVE.encode_decode)
    assert capacity(CURVE, ALIKE) == pytest.approx(full)
