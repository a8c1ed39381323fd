"""A server whose steps take the time of a step curve, and no core: several of them share this machine as GPUs would.

python -m benchmarks.cluster.timed_engine [the server's arguments]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cluster.curve import ASSUMED, StepCurve
from benchmarks.server.null_engine import REPLACED, NullEngine
from engines.backends.device import Buffer, Reader, Stream
from engines.backends.host import HostDevice
from engines.backends.registry import SPECS, register
from server.__main__ import main


@dataclass(frozen=True, slots=True)
class TimedCall:
    """A call that changes no memory and takes `seconds`."""

    seconds: float

    def launch(self) -> None:
        time.sleep(self.seconds)


class TimedEngine:
    """Any graph of a bundle: a step takes as long as the curve says, and decoding an image."""

    def __init__(self, graph: str, curve: StepCurve) -> None:
        self._graph, self._curve = graph, curve

    def bind(self, buffers: Mapping[str, Buffer]) -> TimedCall:
        NullEngine().bind(buffers)  # writes the images once
        return TimedCall(self._seconds(buffers))

    def _seconds(self, buffers: Mapping[str, Buffer]) -> float:
        match self._graph:
            case "denoise":
                return self._curve.step(min(buffers["timestep"].shape[0], self._curve.max_rows))
            case "decode":
                return self._curve.encode_decode * buffers["images"].shape[0]
            case _:
                return 0.0


class TimedDevice(HostDevice):
    """Host memory, and engines that only take time. Steps are padded to a row bucket, as on GPUs."""

    name = "a step curve"
    pads = True

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> TimedEngine:  # noqa: ARG002 - the same for every file
        return TimedEngine(path.stem, StepCurve.read(ASSUMED))


def open_device(*, threads: int) -> TimedDevice:  # noqa: ARG001 - every backend's signature
    return TimedDevice()


if __name__ == "__main__":
    register(replace(SPECS[REPLACED], module="benchmarks.cluster.timed_engine"))
    sys.exit(main([*sys.argv[1:], "--backend", REPLACED]))
