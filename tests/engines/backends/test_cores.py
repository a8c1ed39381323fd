"""How many threads a quota or a mask leaves room for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from engines.backends import cores


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four cores: 0 and 4 share one, 1 and 5, and so on."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    allow(monkeypatch, set(range(8)))


def allow(monkeypatch: pytest.MonkeyPatch, processors: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: processors)


def machine(root: Path, files: Mapping[str, str]) -> Path:
    topology = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n"
        for cpu in range(8)
    }
    for name, content in {**topology, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


SECOND = {"proc/self/cgroup": "0::/\n"}
NESTED = {"proc/self/cgroup": "0::/pods/mine\n"}
FIRST = {"proc/self/cgroup": "3:cpuset:/\n2:cpuacct,cpu:/docker/mine\n0::/\n"}
OURS = {"proc/self/cgroup": "2:cpu,cpuacct:/\n"}


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 0),
        (SECOND, 0),
        ({**SECOND, "sys/fs/cgroup/cpu.max": "max 100000\n"}, 0),
        ({**SECOND, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({**SECOND, "sys/fs/cgroup/cpu.max": "399999 100000\n"}, 3),
        ({**SECOND, "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({**SECOND, "sys/fs/cgroup/cpu.max": "600000 100000\n"}, 0),  # more than there are cores
        ({**SECOND, "sys/fs/cgroup/cpu.max": "what is this\n"}, 0),
        ({**NESTED, "sys/fs/cgroup/pods/cpu.max": "200000 100000\n", "sys/fs/cgroup/pods/mine/cpu.max": "max 9\n"}, 2),
        ({**FIRST, "sys/fs/cgroup/cpu/docker/mine/cpu.cfs_quota_us": "-1\n"}, 0),
        (
            {
                **FIRST,
                "sys/fs/cgroup/cpu/docker/mine/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/mine/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({**OURS, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "500\n"}, 2),
    ],
)
def test_a_quota_limits_the_threads(tmp_path: Path, files: Mapping[str, str], threads: int) -> None:
    assert cores.limit(machine(tmp_path, files)) == threads


@pytest.mark.parametrize(
    ("processors", "threads"), [({0, 1, 2}, 3), ({0, 4}, 1), ({1, 2, 6}, 2), (set(range(8)), 0), (set(range(7)), 4)]
)
def test_a_mask_counts_by_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: set[int], threads: int
) -> None:
    allow(monkeypatch, processors)
    assert cores.limit(machine(tmp_path, {})) == threads


def test_the_tighter_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {0, 1, 2})
    for quota, threads in (("200000 100000", 2), ("350000 100000", 3)):
        assert cores.limit(machine(tmp_path, {**SECOND, "sys/fs/cgroup/cpu.max": quota})) == threads


def test_the_runtimes_heed_it(bundle: Path) -> None:
    """Threads of a real process over a real graph, on one processor of however many."""
    code = f"""
import os, threading
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
from engines.backends.registry import open_device
count = lambda: len(os.listdir("/proc/self/task"))
from pathlib import Path
import numpy, onnxruntime
before = count()
device = open_device("onnxruntime")
device.load(Path({str(bundle / "onnx" / "decode.onnx")!r}), device.stream("test"))
print(count() - before)
device = open_device("openvino")
engine = device.load(Path({str(bundle / "onnx" / "decode.onnx")!r}), device.stream("test"))
print(engine._compiled._any.get_property("INFERENCE_NUM_THREADS"))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - our own
    assert ended.stdout.split() == ["0", "1"]
    assert cores.name()
