"""A server whose engines compute nothing, so that all the time it takes is its own. Every image is the same pattern.

python -m benchmarks.server.null_engine [the server's arguments]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from engines.backends.device import Buffer, Reader, Stream
from engines.backends.host import HostDevice, host_array
from engines.backends.registry import SPECS, register
from engines.contract import Array
from server.__main__ import main

REPLACED = "onnxruntime"  # the backend by whose name every bundle can be served


class NullCall:
    """A call that changes no memory."""

    def launch(self) -> None:
        """There is nothing to compute."""


class NullEngine:
    """Any graph of a bundle: its outputs never change."""

    def bind(self, buffers: Mapping[str, Buffer]) -> NullCall:
        if "is_finite" in buffers:  # the decoder's: the only outputs that the server reads
            host_array(buffers["is_finite"]).fill(1)
            images = host_array(buffers["images"])
            images[:] = waves(*images.shape[1:3])
        return NullCall()


class NullDevice(HostDevice):
    """Host memory with engines that compute nothing. Steps are padded to a row bucket, as on GPUs."""

    name = "no engine"
    pads = True

    def load(self, path: Path, stream: Stream, *, read: Reader = Path.read_bytes) -> NullEngine:  # noqa: ARG002 - the same for every file
        return NullEngine()


def waves(height: int, width: int) -> Array:
    """An image [height, width, 3] u8 of soft colours; its PNG takes about as long to encode as the demo model's."""
    y, x = np.mgrid[0:height, 0:width] * (2 * np.pi / 64)
    colours = np.stack([np.sin(x) + np.cos(y / 3), np.sin(x + y), np.cos(x / 2 - y)], axis=-1)
    image: Array = (127 + 60 * colours).astype(np.uint8)
    return image


def open_device(*, threads: int) -> NullDevice:  # noqa: ARG001 - every backend's signature
    return NullDevice()


def install() -> None:
    """Make the server of this process open this device in place of ONNX Runtime's."""
    register(replace(SPECS[REPLACED], module=__name__))


if __name__ == "__main__":
    install()
    sys.exit(main([*sys.argv[1:], "--backend", REPLACED]))
