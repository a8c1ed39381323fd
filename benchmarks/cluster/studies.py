"""The runs of the simulation: which loads, losses and rises are tried. Each task runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from benchmarks.cluster.autoscaler import Autoscaler, Scaling, Signal
from benchmarks.cluster.balancers import BalancerName
from benchmarks.cluster.cluster import Cluster, ClusterRun, Loss, simulate
from benchmarks.cluster.curve import StepCurve
from benchmarks.cluster.results import LoadPoint, LossPoint, ScalingPoint, SeedFigures, figures
from benchmarks.cluster.workload import MIX, Pattern, bursty, capacity, rising, steady

LOADS = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
SIZES = {8: 160.0, 32: 64.0, 128: 32.0, 512: 24.0}  # GPUs, and the seconds that are simulated of each load
BURSTY_SIZES = (8, 128)
BURSTY_SECONDS = 80.0
THREE: tuple[BalancerName, ...] = ("least open", "power of two", "round robin")
_LOOKING: tuple[BalancerName, ...] = ("least open", "power of two")
_BROKEN = 0.8  # the load at which all others have long queues
WARM_UP = 0.25  # of the time: arrivals that are not counted
LOSSES = ((8, 1), (32, 1), (32, 4), (128, 16))  # servers, and how many of them die
LOSS_LOADS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.85)
UNNOTICED = 5.0  # seconds until a balancer sends nothing more to a server that is gone
AFTER_LOSS = 60.0  # seconds that are counted
STARTS = (30.0, 180.0, 360.0)  # seconds until a new server is ready
SIGNALS: tuple[tuple[Signal, float, float], ...] = (  # with their targets, and the part that a decision may stop
    ("rows", 0.5, 1.0),
    ("rows", 0.6, 1.0),
    ("rows", 0.7, 1.0),
    ("open", 2.0, 1.0),
    ("waiting", 1.0, 0.05),
)
DEMAND = 6.0  # servers' worth of requests at a load of 1, before it doubles
SETTLE, RISE, AFTER_RISE = 450.0, 600.0, 150.0  # seconds

Point = LoadPoint | LossPoint | ScalingPoint
Task = Callable[[], Point]


@dataclass(frozen=True, slots=True)
class Study:
    """The step curve, the seeds, and a factor by which the times are cut, for tests."""

    curve: StepCurve
    seeds: Sequence[int]
    sizes: Sequence[int] = tuple(SIZES)
    shorter: float = 1.0

    @property
    def rate(self) -> float:
        """Requests per second of one server at a load of 1."""
        return capacity(self.curve, MIX)

    def tasks(self) -> Iterator[Task]:
        """Everything to simulate, the longest first."""
        for size in sorted(self.sizes, reverse=True):
            for load in reversed(LOADS):
                yield from (partial(self.load, size, one, load) for one in THREE if load <= _BROKEN or one in _LOOKING)
        for load in reversed(LOADS):
            yield from (
                partial(self.load, size, "random", load) for size in self.sizes if size == 32 and load <= _BROKEN
            )
            yield from (partial(self.load, size, "least open", load, "bursty") for size in BURSTY_SIZES)
        for size, lost in LOSSES:
            yield from (partial(self.loss, size, lost, load) for load in LOSS_LOADS)
        for start in STARTS:
            for signal, target, shrink in SIGNALS:
                yield partial(self.scale, Scaling(signal=signal, target=target, start=start, shrink=shrink))

    def load(self, size: int, balancer: BalancerName, load: float, pattern: Pattern = "poisson") -> LoadPoint:
        seconds = (SIZES[size] if pattern == "poisson" else BURSTY_SECONDS) * self.shorter
        made = steady if pattern == "poisson" else bursty

        def run(seed: int) -> SeedFigures:
            workload = made(load * size * self.rate, seconds=seconds, seed=seed)
            found = simulate(self.curve, workload, size=size, balancer=balancer, seed=seed)
            return figures(found, seed=seed, size=size, begin=WARM_UP * seconds, end=seconds)

        return LoadPoint(size=size, balancer=balancer, pattern=pattern, load=load, runs=tuple(map(run, self.seeds)))

    def loss(self, size: int, lost: int, load: float) -> LossPoint:
        """Servers die under a steady load."""
        before, after = 30 * self.shorter, AFTER_LOSS * self.shorter

        def run(seed: int) -> SeedFigures:
            workload = steady(load * size * self.rate, seconds=before + after, seed=seed)
            losses = [Loss(before, lost, UNNOTICED)]
            found = simulate(self.curve, workload, size=size, balancer="least open", seed=seed, losses=losses)
            return figures(found, seed=seed, size=size - lost, begin=before, end=before + after)

        runs = tuple(map(run, self.seeds))
        return LossPoint(size=size, lost_servers=lost, unnoticed=UNNOTICED, load=load, runs=runs)

    def scale(self, scaling: Scaling) -> ScalingPoint:
        """The load doubles while an autoscaler follows it."""
        end = (SETTLE + RISE + AFTER_RISE) * self.shorter
        begin = SETTLE * self.shorter
        found = [self._rise(scaling, seed, begin, end) for seed in self.seeds]
        sizes = [_mean_size(run, begin, end) for run in found]
        return ScalingPoint(
            scaling=scaling,
            rise=RISE * self.shorter,
            runs=tuple(
                figures(run, seed=seed, size=1, begin=begin, end=end)
                for run, seed in zip(found, self.seeds, strict=True)
            ),
            servers=sum(sizes) / len(sizes),
        )

    def _rise(self, scaling: Scaling, seed: int, begin: float, end: float) -> ClusterRun:
        demand = DEMAND * self.rate
        top = begin + RISE * self.shorter
        workload = rising(demand, 2 * demand, begin=begin, end=top, seconds=end, seed=seed)
        cluster = Cluster(self.curve, workload, size=int(2 * DEMAND), balancer="least open", seed=seed)
        Autoscaler(cluster, scaling, self.curve)
        return cluster.run()


def _mean_size(run: ClusterRun, begin: float, end: float) -> float:
    """The servers in rotation, on average from `begin` to `end`."""
    spans = pairwise([*run.servers, (end, 0)])
    seconds = sum(size * max(min(until, end) - max(since, begin), 0) for (since, size), (until, _) in spans)
    return seconds / (end - begin)
