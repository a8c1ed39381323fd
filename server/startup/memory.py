"""How freed memory goes back to the system."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
_LARGE = 1024 * 1024  # bytes


def return_large_blocks() -> None:
    """Have the C library give each large block back to the system as soon as it is freed.

    By default glibc does so only until blocks of that size were freed once; then it takes them from its heap, where a
    small block behind them keeps hundreds of megabytes of bodies and images. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
