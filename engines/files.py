"""Files: hashes, and writes that readers never see half of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: readers see the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        publish(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def publish(beside: Path, path: Path) -> None:
    """Give a finished file its name, once its contents are on disk."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def sha256_of_code(paths: Iterable[Path]) -> str:
    """One hash over Python source: files, and every module in the folders among `paths`."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(path.parent).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
