"""Freeing the memory of files that libraries have mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from engines.contract import Array

_MAPS = Path("/proc/self/maps")


def release_pages(folder: Path) -> None:
    """Drop the resident pages of read-only mapped files in `folder`, which stay mapped. Does nothing but on Linux.

    The next access reads the same bytes from the page cache or the disk. The mappings must never have been written to.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, end in _mappings(folder.resolve()):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


class FileArrays:
    """Copies of arrays, each in a file without a name: unlike other memory, the system can take theirs back.

    Where no file can be written, and on other systems than Linux, they are the arrays themselves. They are only read.
    """

    def __init__(self) -> None:
        self._arrays: list[Array] = []  # libraries that share their memory may not keep them alive
        self._files: list[mmap.mmap] = []

    def copy(self, array: Array) -> Array:
        copied = self._copied(array)
        self._arrays.append(copied)
        return copied

    def release_pages(self) -> None:
        """As the function of this name, for all of them."""
        for file in self._files:
            file.madvise(mmap.MADV_DONTNEED)

    def _copied(self, array: Array) -> Array:
        if sys.platform == "linux":
            with suppress(OSError), TemporaryFile() as file:
                array.tofile(file)
                mapped = mmap.mmap(file.fileno(), array.nbytes)
                self._files.append(mapped)
                return np.frombuffer(mapped, array.dtype).reshape(array.shape)
        return array


def _mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """The start and end addresses of read-only mappings of files in `folder`."""
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, permissions, _offset, _device, _inode, *name = line.split(maxsplit=5)
        if name and permissions.startswith("r--") and Path(name[0]).is_relative_to(folder):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)
