"""Requests that occupy a server, and what its metrics count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

_LONG = {"prompt": "a red heart", "num_images": 8, "num_inference_steps": 200}  # all rows


_STEPS = 2  # whose times say when there may be room


class FullQueue:
    """One request that runs and one that waits, until it is freed. A context manager."""

    def __init__(self, serving: HeldServing) -> None:
        self.serving = serving
        self._open = ExitStack()
        self._streams: list[Iterator[str]] = []  # which close their connections when they are dropped

    def __enter__(self) -> Self:
        self._open.enter_context(self.serving.held())
        self.serving.let(_STEPS)
        running = self._stream()
        for _ in range(_STEPS):  # after the last of them no other request can join
            _await(running, "step")
        _await(self._stream(), "queued")
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """End both requests, and wait until the server has room."""
        self._open.close()
        wait_until(lambda: is_idle(self.serving))

    def _stream(self) -> Iterator[str]:
        accept = {"Accept": "text/event-stream"}
        stream = self.serving.client.stream("POST", "/generate", json=_LONG, headers=accept)
        self._streams.append(self._open.enter_context(stream).iter_lines())
        return self._streams[-1]


def _await(lines: Iterator[str], event: str) -> None:
    next(line for line in lines if line == f"event: {event}")


def is_idle(serving: Serving) -> bool:
    metrics = serving.metrics()
    return metrics["latentd_requests_running"] == metrics["latentd_requests_waiting"] == 0


def count(serving: Serving, outcome: str) -> float:
    """How many requests to any API ended so: completed, failed or cancelled."""
    return serving.total("latentd_requests_total", outcome=outcome)


class Cancelling:
    """Checks that a request that is begun within it, and left early, is cancelled and frees its rows."""

    def __init__(self, serving: HeldServing) -> None:
        self._serving = serving
        self._hold = ExitStack()

    def __enter__(self) -> None:
        self._hold.enter_context(self._serving.held())
        self._serving.let(100)  # so it does not end by itself
        self._before = count(self._serving, "cancelled")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._hold:
            if kind is None:
                wait_until(lambda: count(self._serving, "cancelled") == self._before + 1)
                wait_until(lambda: is_idle(self._serving))
