"""How much main memory this process may use: the machine's, or less in a container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")  # of control groups v2 and v1


def limit(root: Path = _ROOT) -> int:
    """The machine's memory, or the container's limit, in bytes. `root` replaces the file system's in tests."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _LIMITS:
        with suppress(OSError, ValueError):  # no such control group; or "max"
            limits.append(int((root / name).read_text(encoding="ascii")))
    return min(limits)
