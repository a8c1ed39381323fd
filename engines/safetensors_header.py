"""The header of a .safetensors file: names and shapes of its tensors, and its metadata. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engines.errors import CheckpointError

_MOST_HEADER = 100 * 2**20  # bytes: the library takes no larger ones
_MOST_REASON = 160  # characters of the library's reason: it may hold the whole list of types
_NOT_SAFETENSORS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights themselves: run `git lfs pull` in its folder.",
    b"<!doctype": "a web page, not weights: download it again, signed in where the page asks for it.",
    b"<html": "a web page, not weights: download it again, signed in where the page asks for it.",
    b"pk\x03\x04": "a pickle (or another zip archive) by another name: give it its own suffix, .ckpt, or convert it.",
    b"\x80\x02": "a pickle by another name: give it its own suffix, .ckpt, or convert it to .safetensors.",
    b"gguf": "a GGUF file by another name, which is not supported: download the .safetensors one.",
}
TensorShapes = Mapping[str, tuple[int, ...]]


def read_header(path: Path) -> tuple[TensorShapes, Mapping[str, str]]:
    """Return the shapes of the tensors in a .safetensors file, in the order of their data, and its metadata.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or is damaged.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it is not a file.")
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
            return shapes, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} {diagnosis(path, str(error))}") from error


def diagnosis(path: Path, reason: str) -> str:
    """What the file is instead, and what to do. The library's `reason` where it is none of the usual ones."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if not start:
            return "is empty: download it again."
        for sign, what in _NOT_SAFETENSORS.items():
            if start.lstrip().lower().startswith(sign):
                return f"is {what}"
        end = 8 + int.from_bytes(start[:8], "little")
        if end > size and start[8:9] == b"{":
            return f"is incomplete ({size:,} bytes, and its header alone has {end:,}): download it again."
        header = start[8:] + file.read(max(0, end - len(start))) if end <= min(size, _MOST_HEADER) else b""
    if header and size < (whole := end + _data_size(header)):
        return f"is incomplete ({size:,} of {whole:,} bytes): download it again."
    reason = reason.removeprefix("Error while deserializing header: ").splitlines()[0][:_MOST_REASON]
    return f"is not a .safetensors file, or is damaged ({reason}): download it again."


def _data_size(header: bytes) -> int:
    """Bytes of all tensors, as the header says; 0 where it cannot be read."""
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        return max(int(tensor["data_offsets"][1]) for tensor in tensors.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
