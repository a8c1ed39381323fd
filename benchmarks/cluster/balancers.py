"""Which server a balancer sends a request to. It knows of each server only how many requests it left open there."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

BalancerName = Literal["least open", "power of two", "round robin", "random"]

_NONE = "no server is in rotation"


class Balancer(Protocol):
    """Chooses among the servers that are in rotation. `remove` is for those, `set_open` for any."""

    def add(self, server: int) -> None:
        """`server` takes requests from now on."""

    def remove(self, server: int) -> None:
        """`server` gets no more requests."""

    def choose(self) -> int:
        """Return the server for one more request. Raises LookupError where none is in rotation."""

    def set_open(self, server: int, count: int) -> None:
        """So many requests are open at `server`."""


class LeastOpen:
    """The server with the fewest open requests: nginx's `least_conn`. Of several, the one unchanged for longest."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []  # (open, age, server); entries that no longer hold are skipped
        self._age = 0

    def add(self, server: int) -> None:
        self._open[server] = 0
        self.set_open(server, 0)

    def remove(self, server: int) -> None:
        del self._open[server]

    def choose(self) -> int:
        while self._heap:
            count, _, server = self._heap[0]
            if self._open.get(server) == count:
                return server
            heapq.heappop(self._heap)
        raise LookupError(_NONE)

    def set_open(self, server: int, count: int) -> None:
        if server in self._open:
            self._open[server] = count
            self._age += 1
            heapq.heappush(self._heap, (count, self._age, server))


class Random:
    """Any: a Kubernetes Service without a proxy before it chooses so for each connection."""

    def __init__(self, seed: int) -> None:
        self._dice = np.random.default_rng((seed, 2))
        self._drawn: list[float] = []
        self._servers: list[int] = []

    def add(self, server: int) -> None:
        self._servers.append(server)

    def remove(self, server: int) -> None:
        self._servers.remove(server)

    def choose(self) -> int:
        return self._servers[self._draw()]

    def set_open(self, server: int, count: int) -> None:
        """It does not matter."""

    def _draw(self) -> int:
        if not self._servers:
            raise LookupError(_NONE)
        if not self._drawn:
            self._drawn = self._dice.random(4096).tolist()
        return int(self._drawn.pop() * len(self._servers))


class PowerOfTwo(Random):
    """The one with fewer open requests of two drawn at random: Ray Serve's router, Envoy's LEAST_REQUEST."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._open: dict[int, int] = {}

    def add(self, server: int) -> None:
        super().add(server)
        self._open[server] = 0

    def choose(self) -> int:
        one, other = self._draw(), self._draw()
        if one == other:
            other = (one + 1) % len(self._servers)
        return min(self._servers[one], self._servers[other], key=self._open.__getitem__)

    def set_open(self, server: int, count: int) -> None:
        self._open[server] = count


class RoundRobin:
    """One after the other: nginx's default."""

    def __init__(self) -> None:
        self._servers: list[int] = []
        self._next = 0

    def add(self, server: int) -> None:
        self._servers.append(server)

    def remove(self, server: int) -> None:
        self._servers.remove(server)

    def choose(self) -> int:
        if not self._servers:
            raise LookupError(_NONE)
        self._next = (self._next + 1) % len(self._servers)
        return self._servers[self._next]

    def set_open(self, server: int, count: int) -> None:
        """It does not matter."""


BALANCERS: dict[BalancerName, Callable[[int], Balancer]] = {
    "least open": lambda _seed: LeastOpen(),
    "power of two": PowerOfTwo,
    "round robin": lambda _seed: RoundRobin(),
    "random": Random,
}
