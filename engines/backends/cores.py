"""How many processor cores this process may use: container quotas and affinity, which the runtimes ignore."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def limit(root: Path = _ROOT) -> int:
    """The number of threads that a container's quota or an affinity mask allows; 0 if there is no limit.

    A thread beyond the quota slows all of them: the kernel pauses the whole process until the next period. So quotas
    are rounded down, and two hardware threads of one core count once. `root` replaces the file system's in tests.
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
    """The processor's model name."""
    with suppress(OSError):
        for line in (_ROOT / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _siblings(cpu: int, root: Path) -> str:
    """The logical processors that share a core with `cpu`, as the kernel lists them."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in processors, of this process's control groups and of those that contain them."""
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
                yield _quota_v1(folder) if controllers else _quota_v2(folder)
            if folder == mounted:
                break


def _quota_v1(folder: Path) -> float:
    """The quota of a cgroup v1 folder, in processors. Raises ValueError if it is unlimited (-1)."""
    quota, period = (int((folder / f"cpu.cfs_{field}_us").read_text(encoding="ascii")) for field in ("quota", "period"))
    if quota <= 0:
        raise ValueError(quota)
    return quota / period


def _quota_v2(folder: Path) -> float:
    """The quota of a cgroup v2 folder, in processors. Raises ValueError if it is unlimited (max)."""
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return int(quota) / int(period)
