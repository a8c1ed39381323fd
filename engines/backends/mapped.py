"""Freeing the memory of files that libraries have mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

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


def _mappings(folder: Path) -> Iterator[tuple[int, int]]:
    """The start and end addresses of read-only mappings of files in `folder`."""
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, permissions, _offset, _device, _inode, *name = line.split(maxsplit=5)
        if name and permissions.startswith("r--") and Path(name[0]).is_relative_to(folder):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)
