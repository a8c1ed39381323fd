"""Where executors run in tests: the CPU, a GPU that is the host, and real ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backends.cuda import CudaStream
from engines.backends.device import Device, Stream
from tests.engines.backends.fake_cuda import FakeCuda
from tests.support.executing import SECONDS, Running


@dataclass(frozen=True)
class Machine:
    """Where the tests run: a bundle, and a device for its engines of `backend`."""

    bundle: Path
    backend: str
    device: Callable[[], Device]

    def running(self, **options: Any) -> Running:
        return Running(self.bundle, self.device, backend=self.backend, **options)


@dataclass(frozen=True)
class FakeMachine(Machine):
    """A GPU that is the host."""

    cuda: FakeCuda

    def gate(self, stream: Stream) -> AbstractContextManager[None]:
        """Hold `stream` meanwhile."""
        assert isinstance(stream, CudaStream)
        return self.cuda.gate(stream.handle)

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.002)
