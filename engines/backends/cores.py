"""The part of this machine's processor that this process may use, which the runtimes' own counting does not see."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def limit(root: Path = _ROOT) -> int:
    """The threads that a container's quota or an affinity mask leave room for; 0 where nothing is held back.

    A thread beyond a quota makes all wait: the kernel stops the whole process until the next period. So quotas are
    rounded down, and of two threads on one core only one counts. `root` is the file system's, but for tests.
    """
    if sys.platform != "linux":
        return 0
    allowed = os.sched_getaffinity(0)
    cores = len({_siblings(cpu, root) for cpu in allowed})
    quota = min(_quotas(root), default=None)
    if quota is not None and quota < cores:
        return max(int(quota), 1)
    return cores if len(allowed) < (os.cpu_count() or 1) else 0


def name() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in (_ROOT / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _siblings(cpu: int, root: Path) -> str:
    """Which logical processors share the core of `cpu`."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that this process's control groups, and those around them, may take."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        mounted = root / "sys/fs/cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            mounted /= "cpu"
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                yield _first_version(folder) if controllers else _second_version(folder)
            if folder == mounted:
                break


def _first_version(folder: Path) -> float:
    """Raises ValueError where there is none, written as -1."""
    quota, period = (int((folder / f"cpu.cfs_{fact}_us").read_text(encoding="ascii")) for fact in ("quota", "period"))
    if quota <= 0:
        raise ValueError(quota)
    return quota / period


def _second_version(folder: Path) -> float:
    """Raises ValueError where there is none, written as `max`."""
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return int(quota) / int(period)
