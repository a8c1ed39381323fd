"""LoRA files: their headers, and their tensors in FP32, without torch. Nothing is mapped into memory.

A file that is cut short while it is mapped would end the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from engines.errors import CheckpointError
from engines.lora.early import LEARNED
from engines.lora.floats import DTYPES, to_float32
from engines.lora.hints import printable
from engines.lora.scaling import adapter_config_beside
from engines.safetensors_header import TensorShapes, diagnosis

_LARGEST = 8 << 30  # bytes of a file
_LARGEST_HEADER = 16 << 20  # with every tag of a training set; without, some 100 kB


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """What a file says of its tensors, and PEFT's config where that decides how they are scaled."""

    path: Path
    shapes: TensorShapes
    metadata: Mapping[str, str]
    config: str | None  # the text of adapter_config.json beside the file; None if there is none, or it is of no use

    @property
    def name(self) -> str:
        """The file's."""
        return self.path.name

    @property
    def learned(self) -> frozenset[str]:
        """Tokens that were trained with the LoRA: the names of their tensors."""
        return frozenset(key for key in self.shapes if self.metadata.get(key) == LEARNED)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A file that has been read."""

    header: LoraHeader
    sha256: str  # of what was read, PEFT's config included where it decides
    tensors_sha256: str  # of what follows the header, which tools rewrite
    tensors: Mapping[str, NDArray[np.float32]]


def read_lora_header(path: Path) -> LoraHeader:
    """Read no more than the header. Raises CheckpointError: there is no such file, or it is damaged."""
    with _opened(path) as (file, size):
        start = file.read(8)
        return _header(path, start + file.read(min(_length(start), _LARGEST_HEADER)), size)


def read_lora(path: Path) -> LoraFile:
    """Read the whole file, once. Raises CheckpointError: it is missing, damaged, or holds NaN or infinity."""
    with _opened(path) as (file, size):
        if size > _LARGEST:
            raise CheckpointError(
                f"{path.name} has {size:,} bytes, and LoRAs at most {_LARGEST:,}: it is another file."
            )
        content = file.read(_LARGEST)
    header = _header(path, content, len(content))
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call] # its stub has no types
        tensors = {name: _finite(path, name, spec) for name, spec in found}
    except SafetensorError as error:
        raise CheckpointError(f"{path} {diagnosis(path, str(error))}") from error
    after = memoryview(content)[8 + _length(content) :]
    return LoraFile(header, _sha256(content, header.config), hashlib.sha256(after).hexdigest(), tensors)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file, and its size. Within the context errors of the system are CheckpointErrors."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it is not a file.")
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _header(path: Path, content: bytes, size: int) -> LoraHeader:
    """The header at the start of `content`, of a file with `size` bytes."""
    end = 8 + _length(content)
    if len(content) < end or end > 8 + _LARGEST_HEADER:
        raise CheckpointError(f"{path} {diagnosis(path, 'header too large')}")
    try:
        tensors = json.loads(content[8:end])
        metadata = {str(key): str(value) for key, value in (tensors.pop("__metadata__", None) or {}).items()}
        dtypes = {name: str(spec["dtype"]) for name, spec in tensors.items()}
        shapes = {name: tuple(map(int, spec["shape"])) for name, spec in tensors.items()}
        whole = end + max((int(spec["data_offsets"][1]) for spec in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} {diagnosis(path, 'invalid header')}") from error
    if size != whole or min((side for shape in shapes.values() for side in shape), default=0) < 0:
        raise CheckpointError(f"{path} {diagnosis(path, 'its size is not what its header says')}")
    if other := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
        raise CheckpointError(
            f"{path.name} holds {printable(other[0])} in {printable(dtypes[other[0]])}, which is not supported: "
            "convert it to FP16."
        )
    return LoraHeader(path, shapes, metadata, adapter_config_beside(path, shapes, metadata))


def _length(content: bytes) -> int:
    """Bytes of the header after the first eight, which say it."""
    return int.from_bytes(content[:8], "little")


def _finite(path: Path, name: str, spec: Mapping[str, Any]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = to_float32(spec["dtype"], spec["data"]).reshape(spec["shape"])
    if not np.isfinite(values).all():
        raise CheckpointError(f"{path} holds NaN or infinity in {printable(name)}: it is damaged. Download it again.")
    return values


def _sha256(content: bytes, config: str | None) -> str:
    digest = hashlib.sha256(content)
    if config is not None:
        digest.update(config.encode())
    return digest.hexdigest()
