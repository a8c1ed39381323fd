"""Writing engines to disk, and measuring the memory a build takes."""

from __future__ import annotations

import errno
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines.build.trt.errors import NotWritten, format_bytes
from engines.files import publish


def check_writable(out: Path, beside: Path) -> None:
    """Find out before the build, not after."""
    try:
        beside.touch()
    except OSError as error:
        raise NotWritten(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error


def write_engine(plan: Any, out: Path, beside: Path) -> None:
    """Write beside, flush to disk, rename."""
    content = memoryview(plan)
    try:
        with beside.open("wb") as file:
            file.write(content)
        publish(beside, out)
    except OSError as error:
        raise NotWritten(_why_not_written(error, out, content.nbytes)) from error


def _why_not_written(error: OSError, out: Path, needed: int) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        free = format_bytes(shutil.disk_usage(out.parent).free)
        return (
            f"There is no room for {out} ({error.strerror}): it takes {format_bytes(needed)}, {free} are free. "
            "Make room, or choose another --out."
        )
    return f"{out} cannot be written: {error.strerror}. Choose another --out."


def remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def peak_memory() -> int:
    """Bytes of main memory that this process took at most; 0 where the system does not tell.

    Not getrusage: what it tells of a process includes what its parent took before it started it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0])
