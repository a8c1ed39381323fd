"""Packed LoRAs in the host's memory: those that were used last, up to so many bytes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from server.requests.errors import LoraUnreadable
from server.requests.params import Lora

_SOON = 5  # seconds


class PackedLoras:
    """Keeps what was packed, for any thread. Of what several threads want at once, one packs it."""

    def __init__(self, most: int) -> None:
        """Keep up to `most` bytes. Besides, requests may hold as many bytes of LoRAs that are no longer kept."""
        self._most = most
        self._lock = threading.RLock()  # of the finalizers too, which may run in a thread that has it
        self._kept: OrderedDict[Hashable, Lora] = OrderedDict()
        self._bytes = 0
        self._alive = 0  # bytes, kept or held by requests
        self._begun: dict[Hashable, Future[Lora]] = {}

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return self._bytes

    def get(self, key: Hashable, pack: Callable[[], Lora]) -> Lora:
        """What is kept as `key`, or what `pack` makes, which may raise; LoraUnreadable: requests hold too many."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if self._alive - self._bytes > self._most:
                raise LoraUnreadable("Requests that wait hold all the memory for LoRAs: try again.", retry_after=_SOON)
            begun = self._begun.get(key)
            future = self._begun.setdefault(key, Future())
        if begun is not None:
            return begun.result()
        try:
            made = pack()
        except BaseException as error:
            future.set_exception(error)
            raise
        else:
            future.set_result(made)
            self._keep(key, made)
            return made
        finally:
            with self._lock:
                del self._begun[key]

    def _keep(self, key: Hashable, lora: Lora) -> None:
        with self._lock:
            self._kept[key] = lora
            self._bytes += lora.values.nbytes
            self._alive += lora.values.nbytes
            weakref.finalize(lora.values, self._forget, lora.values.nbytes)
            while self._bytes > self._most:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.values.nbytes

    def _forget(self, size: int) -> None:
        with self._lock:
            self._alive -= size
