"""A GPU that is the host: its memory, its streams, and what is wrong with their use."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import numpy as np
from cuda.bindings import runtime

from engines.contract import Array
from tests.engines.backends.fake_cuda.hazards import Hazards, Use
from tests.engines.backends.fake_cuda.schedules import Schedule, Threads
from tests.engines.backends.fake_cuda.streams import FakeStream, running

Status = runtime.cudaError_t

GIB = 2**30
_ALIGNMENT = 256
_OLD = 0xAB  # what fresh memory is full of
_FREED = 0xDB  # what freed memory is full of


@dataclass
class Block:
    """Allocated memory."""

    array: Array
    size: int
    pinned: bool


class Gpu:
    """What tests and the fakes of libraries ask of the GPU, behind CUDA's functions."""

    def __init__(self, *, total: int = 24 * GIB, others: int = 0, schedule: Schedule | None = None) -> None:
        """A GPU with so many bytes of memory, of which other programs hold some."""
        self.schedule = schedule or Threads()
        self.hazards = Hazards()
        self.total = total
        self.others = others
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()
        self.planted: dict[str, tuple[Any, bool]] = {}
        self.lost: Any = None
        self.blocks: dict[int, Block] = {}
        self._graveyard: list[Array] = []  # so that no address is used twice, and late use is noticed
        self._streams: dict[int, FakeStream] = {}
        self._lock = threading.RLock()
        finalize(self, _close, self._streams).atexit = False
        self._users: dict[int, str] = {}  # by the address of shared scratch
        self._active: Counter[tuple[int, int]] = Counter()

    def fail(self, name: str, status: str, *, sticky: bool = False) -> None:
        """Let the next call of `name` return `status`; if sticky, and every call after it."""
        self.planted[name] = (getattr(Status, status), sticky)

    def lose(self, status: str) -> None:
        """Let every call return `status` from now on."""
        self.lost = getattr(Status, status)

    def fault(self, what: str, *, status: str = "cudaErrorIllegalAddress") -> None:
        """Note what must not be, and lose the device over it, as CUDA would."""
        self.faults.append(what)
        self.lose(status)

    @contextmanager
    def gate(self, handle: int) -> Iterator[None]:
        """Hold a stream: what is given to it inside is done only after."""
        opened = threading.Event()
        self._streams[int(handle)].hold(opened)
        try:
            yield
        finally:
            opened.set()
            self.schedule.changed()

    def priority_of(self, handle: int) -> int:
        return self._streams[int(handle)].priority

    def live(self, *, pinned: bool = False) -> list[int]:
        """The sizes of what is allocated, in the order it was."""
        return [block.size for block in list(self.blocks.values()) if block.pinned == pinned]

    def take(self, size: int) -> int | None:
        """Memory for a library, from the GPU; None where there is not enough."""
        with self._lock:
            if sum(self.live()) + self.others + size > self.total:
                return None
            return self._allocated(size, pinned=False)

    def give_back(self, address: int) -> None:
        block = self.blocks.pop(address)
        self.hazards.freed(address)
        block.array[:] = _FREED
        self._graveyard.append(block.array)

    def memory(self, address: int, size: int, *, pinned: bool = False) -> Array | None:
        """The bytes there, or None, and a fault, where not all of them are allocated."""
        block = self._block(address, size)
        if block is not None and self.blocks[block].pinned == pinned:
            raw = (ctypes.c_uint8 * size).from_address(address)
            return np.ctypeslib.as_array(raw)
        kind = "pinned" if pinned else "device"
        self.fault(f"{size} bytes at {address:#x} are not in allocated {kind} memory")
        return None

    def use(self, address: int, size: int, *, writes: bool = False) -> None:
        """Note that the work which is being done uses the bytes there; a fault if nothing orders it and another one."""
        stamp, block = running(), self._block(address, size)
        if stamp and block is not None:
            hazard = self.hazards.add(block, Use(stamp, address, address + size, writes))
            self.faults += [hazard] if hazard else []

    @contextmanager
    def using(self, address: int, size: int) -> Iterator[None]:
        """Work with scratch memory that nothing else may work with meanwhile."""
        key = (address, size)
        with self._lock:
            overlap = any(start < address + size and address < start + n for start, n in self._active)
            self._active[key] += 1
        if overlap:
            self.fault(f"the scratch at {address:#x} is used twice at once")
        try:
            yield
        finally:
            with self._lock:
                self._active -= Counter([key])

    def belongs(self, address: int, to: str) -> None:
        """Scratch memory is one stream's: what orders its users is that they are on it."""
        owner = self._users.setdefault(address, to)
        if owner != to:
            self.fault(f"the scratch at {address:#x} of {owner} is given to {to}")

    # CUDA's functions

    def _allocated(self, size: int, *, pinned: bool) -> int:
        array = np.full(size + _ALIGNMENT, _OLD, np.uint8)
        address = -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self.blocks[address] = Block(array, size, pinned)
        return address

    def _block(self, address: int, size: int) -> int | None:
        """The address of the allocated block in which so many bytes are."""
        blocks = list(self.blocks.items())
        return next((start for start, one in blocks if start <= address and address + size <= start + one.size), None)


def _close(streams: dict[int, FakeStream]) -> None:
    for stream in streams.values():
        stream.close()
