"""The header of a .safetensors file: names and shapes of its tensors, and its metadata. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.checkpoints.errors import CheckpointError

TensorShapes = Mapping[str, tuple[int, ...]]


def read_header(path: Path) -> tuple[TensorShapes, Mapping[str, str]]:
    """Return the shapes of the tensors in a .safetensors file, in the order of their data, and its metadata.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or is damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - compiling a bundle works without it
    except ImportError:
        raise CheckpointError(
            "Reading a checkpoint needs the package safetensors: pip install 'latentd[build]'."
        ) from None
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
            return shapes, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a .safetensors file, or is damaged ({error}): download it again."
        ) from error
