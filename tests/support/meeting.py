"""Requests that meet on a server, however fast it is: it takes no step before all of them are there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from tests.support.bare_server import wait_until
from tests.support.held_server import VARIABLE
from tests.support.serving import Serving

_SECONDS = 300  # that a test waits for what must come, on a machine that may be busy

T = TypeVar("T")


class HeldServing(Serving):
    """A server whose steps can be held."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._steps = Path(self._folder.name) / "steps"
        self._holds = 0
        environment = {**os.environ, VARIABLE: str(self._steps)}
        super().__init__(bundle, *arguments, module="tests.support.held_server", environment=environment)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._folder.cleanup()

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Within it, the server accepts requests and takes no step: nobody joins those that run; who leaves is gone."""
        self._holds += 1
        self.let(0)
        try:
            yield self
        finally:
            self._steps.unlink()

    def let(self, steps: int) -> None:
        """Within `held`: let the server take so many steps since then."""
        self._steps.write_text(f"{self._holds} {steps}")

    @property
    def unended(self) -> float:
        """How many requests wait or run."""
        metrics = self.metrics()
        return metrics["latentd_requests_waiting"] + metrics["latentd_requests_running"]

    def wait_for(self, count: int) -> None:
        """Until so many requests wait or run."""
        wait_until(lambda: self.unended == count, seconds=_SECONDS)

    def together(self, *calls: Callable[[], T]) -> list[T]:
        """What the calls return, each of which sends one request: they share steps as far as they can."""
        with ThreadPoolExecutor(len(calls)) as pool:
            return [one.result() for one in self.sent(pool, *calls)]

    def sent(self, pool: ThreadPoolExecutor, *calls: Callable[[], T]) -> Sequence[Future[T]]:
        """Call in threads of `pool`; the server has all requests and goes on."""
        self.wait_for(0)
        with self.held():
            futures = [pool.submit(call) for call in calls]
            wait_until(lambda: self._are_there(futures), seconds=_SECONDS)
        return futures

    def _are_there(self, futures: Sequence[Future[T]]) -> bool:
        """Whether all requests wait or run; raises what a call has raised."""
        for one in futures:
            if one.done():
                one.result()
        return self.unended + sum(one.done() for one in futures) >= len(futures)
