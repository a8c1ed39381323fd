"""A server whose engines do nothing, so that what is left is the server's own time. It serves no pictures of anything.

python -m benchmarks.server.null_engine [the server's arguments]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from engines.backends import registry
from engines.backends.device import Buffer, Stream
from engines.backends.host import HostDevice, host_array
from engines.contract import Array
from server.__main__ import main

_STAND_IN = "onnxruntime"  # whose name every bundle can be served under


class NullCall:
    """A launch that leaves all memory as it is."""

    def launch(self) -> None:
        """There is nothing to compute."""


class NullEngine:
    """Any graph of a bundle: its outputs never change."""

    def bind(self, buffers: Mapping[str, Buffer]) -> NullCall:
        if "is_finite" in buffers:  # the decoder's: the only outputs that anybody looks at
            host_array(buffers["is_finite"]).fill(1)
            images = host_array(buffers["images"])
            images[:] = waves(*images.shape[1:3])
        return NullCall()


class NullDevice(HostDevice):
    """The host's memory under engines that do nothing. Steps are filled up, as on GPUs."""

    name = "no engine"
    pads = True

    def load(self, path: Path, stream: Stream) -> NullEngine:  # noqa: ARG002 - whatever it holds
        return NullEngine()


def waves(height: int, width: int) -> Array:
    """A picture [height, width, 3] u8 of soft colours, whose PNG takes about the time of one of the demo model's."""
    y, x = np.mgrid[0:height, 0:width] * (2 * np.pi / 64)
    colours = np.stack([np.sin(x) + np.cos(y / 3), np.sin(x + y), np.cos(x / 2 - y)], axis=-1)
    picture: Array = (127 + 60 * colours).astype(np.uint8)
    return picture


def open_device(*, threads: int) -> NullDevice:  # noqa: ARG001 - as every backend's
    return NullDevice()


def install() -> None:
    """Let the server of this process open this device in place of ONNX Runtime's."""
    registry.SPECS[_STAND_IN] = replace(registry.SPECS[_STAND_IN], module=__name__)


if __name__ == "__main__":
    install()
    sys.exit(main([*sys.argv[1:], "--backend", _STAND_IN]))
