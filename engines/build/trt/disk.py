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


def check_writable(out: Path, temporary: Path) -> None:
    """Raise NotWritten if the engine cannot be written, before the build takes its time."""
    try:
        temporary.touch()
    except OSError as error:
        raise NotWritten(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error


def write_engine(plan: Any, out: Path, temporary: Path) -> None:
    """Write `plan` to `temporary`, flush it to disk and rename it to `out`. Raises NotWritten."""
    content = memoryview(plan)
    try:
        with temporary.open("wb") as file:
            file.write(content)
        publish(temporary, out)
    except OSError as error:
        raise NotWritten(_why_not_written(error, out, content.nbytes)) from error


def _why_not_written(error: OSError, out: Path, needed: int) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        free = format_bytes(shutil.disk_usage(out.parent).free)
        return (
            f"There is no space for {out} ({error.strerror}): it takes {format_bytes(needed)}, {free} are free. "
            "Free some space, or choose another --out."
        )
    return f"{out} cannot be written: {error.strerror}. Choose another --out."


def remove(path: Path) -> None:
    """Delete `path`, if it exists and that is possible."""
    with suppress(OSError):
        path.unlink()


def peak_memory() -> int:
    """The peak of this process's main memory, in bytes; 0 on systems without /proc.

    getrusage would include what the parent used before it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0])
