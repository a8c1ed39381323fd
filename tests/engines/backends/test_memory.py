"""The memory that a process may use is the machine's, or its container's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines.backends import memory

PRESENT = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("name", "content", "limit"),
    [
        ("memory.max", "1048576\n", 1 << 20),
        ("memory.max", "max\n", PRESENT),
        ("memory.max", f"{PRESENT * 2}\n", PRESENT),
        ("memory/memory.limit_in_bytes", "1048576\n", 1 << 20),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", PRESENT),
        ("other", "", PRESENT),
    ],
)
def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path, name: str, content: str, limit: int) -> None:
    file = tmp_path / "sys/fs/cgroup" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert memory.limit(tmp_path) == limit
