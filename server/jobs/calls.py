"""Calls of a store from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from server.jobs.store import JobStore

P = ParamSpec("P")
T = TypeVar("T")


class StoreCalls:
    """Calls a store in the order of the calls: one that may block in a thread of its own, others at once."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, "jobs") if store.persistent else None

    async def __call__(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._thread is None:
            return method(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(method, *args, **kwargs))

    async def close(self) -> None:
        """Close the store, after all calls before."""
        await self(self.store.close)
        if self._thread:
            self._thread.shutdown()
