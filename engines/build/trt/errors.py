"""The reasons why an engine was not built."""

from __future__ import annotations

from engines.errors import EngineError

REDUCE = "use fewer --resolution, --rows or --decode-batch"  # the remedy if memory is full


class BuildError(EngineError):
    """TensorRT made no engine."""


class Unavailable(BuildError):
    """TensorRT, or the GPU that it builds on, is missing."""


class GraphRefused(BuildError):
    """TensorRT does not accept the ONNX graph, or the profiles do not match its inputs."""


class OutOfMemory(BuildError):
    """The build needs more memory than there is."""


class NotWritten(BuildError):
    """The engine file cannot be written."""


KINDS: dict[str, type[BuildError]] = {
    kind.__name__: kind for kind in (BuildError, Unavailable, GraphRefused, OutOfMemory, NotWritten)
}


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
