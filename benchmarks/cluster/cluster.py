"""Simulated servers behind one balancer, in virtual time: arrivals, lost servers, and servers that start and stop."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.balancers import BALANCERS, BalancerName
from benchmarks.cluster.curve import StepCurve
from benchmarks.cluster.server_model import OpenRequest, SimulatedServer, kinds_on_server
from benchmarks.cluster.workload import Workload

Ending = Literal["completed", "refused", "lost"]
ENDINGS: tuple[Ending, ...] = ("completed", "refused", "lost")
MAX_WAITING = 64  # the server's default


@dataclass(frozen=True, slots=True)
class Loss:
    """Servers that die at one moment; the balancer notices after `unnoticed` seconds, and requests hang until then."""

    at: float
    servers: int
    unnoticed: float


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """How the requests of a workload ended, each once."""

    workload: Workload
    ending: NDArray[np.int8]  # [n] an index into ENDINGS
    latency: NDArray[np.float64]  # [n] seconds since the arrival; infinity unless completed
    slowdown: NDArray[np.float64]  # [n] times the latency of such a request on an idle server
    servers: tuple[tuple[float, int], ...]  # when how many were in rotation


class Cluster:
    """`size` servers and their balancer. `run` may be called once."""

    def __init__(
        self, curve: StepCurve, workload: Workload, *, size: int, balancer: BalancerName, seed: int = 0
    ) -> None:
        self._curve, self._workload = curve, workload
        self._kinds = kinds_on_server(curve, workload.mix)
        self._balancer = BALANCERS[balancer](seed)
        self._dice = np.random.default_rng((seed, 3))
        self._servers: list[SimulatedServer] = []
        self._rotation: set[int] = set()
        self._dead: dict[int, list[OpenRequest]] = {}  # servers that hang, with the requests that were sent to them
        self._changes: list[tuple[float, int]] = []  # a heap of servers, by when they are due
        self._actions: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._numbers = itertools.count()
        self._open = 0
        self._ending = np.full(len(workload.at), -1, np.int8)
        self._ended = np.full(len(workload.at), math.inf)
        self._sizes: list[tuple[float, int]] = []
        self.now = 0.0
        for _ in range(size):
            self.start_server()

    def run(self) -> ClusterRun:
        """Let everything arrive and end."""
        at, kinds = self._workload.at.tolist(), self._workload.kind.tolist()
        count = 0
        while count < len(at) or self._open:
            arrival = at[count] if count < len(at) else math.inf
            change = self._changes[0][0] if self._changes else math.inf
            action = self._actions[0][0] if self._actions else math.inf
            if action <= min(arrival, change):
                self.now, _, act = heapq.heappop(self._actions)
                act()
            elif arrival <= change:
                self.now = arrival
                self._open += 1
                self._send(OpenRequest(count, self._kinds[kinds[count]], arrival))
                count += 1
            else:
                self._change_server()
        return self._result()

    def at(self, moment: float, act: Callable[[], None]) -> None:
        """Call `act` at `moment`."""
        heapq.heappush(self._actions, (moment, next(self._numbers), act))

    def lose(self, loss: Loss) -> None:
        """Plan a loss."""
        self.at(loss.at, lambda: self._kill(loss))

    def start_server(self) -> None:
        """A server that is ready comes into rotation now."""
        number = len(self._servers)
        quick = any(kind.is_quick for kind in self._kinds)
        self._servers.append(SimulatedServer(self._curve, max_waiting=MAX_WAITING, expects_quick=quick))
        self._rotation.add(number)
        self._balancer.add(number)
        self._note_size()

    def drain_server(self) -> None:
        """The newest server gets no more requests; it ends those that it has."""
        self._leave(max(self._rotation))

    @property
    def size(self) -> int:
        """The servers in rotation."""
        return len(self._rotation)

    @property
    def open(self) -> int:
        """Requests that wait or run at the servers in rotation."""
        return sum(self._servers[number].open for number in self._rotation)

    @property
    def waiting(self) -> int:
        """Requests that wait at the servers in rotation."""
        return sum(self._servers[number].waiting for number in self._rotation)

    @property
    def served(self) -> int:
        """UNet rows of all steps of all servers so far."""
        return sum(server.served for server in self._servers)

    def _send(self, request: OpenRequest) -> None:
        try:
            number = self._balancer.choose()
        except LookupError:
            self._end(request, "lost")
            return
        if number in self._dead:
            self._dead[number].append(request)
            self._balancer.set_open(number, len(self._dead[number]))
        elif self._servers[number].arrive(self.now, request):
            self._schedule(number)
        else:
            self._end(request, "refused")

    def _change_server(self) -> None:
        due, number = heapq.heappop(self._changes)
        server = self._servers[number]
        if due != server.due:
            return  # it was due earlier, or died
        self.now = due
        ended_at, done = server.change()
        for request in done:
            self._end(request, "completed", ended_at)
        self._schedule(number)

    def _schedule(self, number: int) -> None:
        server = self._servers[number]
        self._balancer.set_open(number, server.open)
        if server.due < math.inf:
            heapq.heappush(self._changes, (server.due, number))

    def _end(self, request: OpenRequest, ending: Ending, at: float = math.inf) -> None:
        if self._ending[request.number] >= 0:
            raise RuntimeError(f"request {request.number} has two endings: the simulation is wrong")
        self._ending[request.number] = ENDINGS.index(ending)
        self._ended[request.number] = at
        self._open -= 1

    def _kill(self, loss: Loss) -> None:
        alive = sorted(self._rotation - self._dead.keys())
        lost = self._dice.permutation(alive)[: loss.servers].tolist()
        for number in lost:
            self._dead[number] = self._servers[number].fail()
        self.at(self.now + loss.unnoticed, lambda: self._notice(lost))

    def _notice(self, lost: Sequence[int]) -> None:
        """Servers are out of rotation before any request is sent again, or it would be to one of them."""
        for number in lost:
            self._leave(number)
        for request in [request for number in lost for request in self._dead.pop(number)]:
            if request.retried:
                self._end(request, "lost")
            else:
                request.retried = True
                self._send(request)

    def _leave(self, number: int) -> None:
        self._rotation.remove(number)
        self._balancer.remove(number)
        self._note_size()

    def _note_size(self) -> None:
        self._sizes.append((self.now, self.size))

    def _result(self) -> ClusterRun:
        latency = self._ended - self._workload.at
        alone = [self._curve.alone(rows=one.rows, steps=one.steps, images=one.images) for one in self._workload.mix]
        slowdown = latency / np.array(alone)[self._workload.kind]
        return ClusterRun(self._workload, self._ending, latency, slowdown, tuple(self._sizes))


def simulate(
    curve: StepCurve,
    workload: Workload,
    *,
    size: int,
    balancer: BalancerName,
    seed: int = 0,
    losses: Sequence[Loss] = (),
) -> ClusterRun:
    """Run `workload` on `size` servers, some of which may be lost."""
    cluster = Cluster(curve, workload, size=size, balancer=balancer, seed=seed)
    for loss in losses:
        cluster.lose(loss)
    return cluster.run()
