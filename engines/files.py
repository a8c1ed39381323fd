"""Files: hashes, and writes of which readers see all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree


def open_regular(path: Path, *, max_size: int | None = None) -> int:
    """A descriptor for reading the regular file at `path`, which is no link.

    Nothing is waited for, as opening a pipe would, and no device is read.

    Raises:
        OSError: it is missing, unreadable, something other than a regular file, or larger than `max_size` bytes.
    """
    # Windows has none of the first three, and needs the last.
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {_kind(found.st_mode)}, and a regular file is expected")
        if max_size is not None and found.st_size > max_size:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, and at most {max_size} are expected")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_code(paths: Iterable[Path]) -> str:
    """One hash over Python source: files, and every module in the folders among `paths`."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(path.parent).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def read_own(path: Path) -> bytes:
    """The contents of a file that only this user, or root, can have written.

    The manifest has no hash of a cache, which TensorRT parses, and which may hold kernels that the GPU runs. A user who
    can write it could change images, or worse.

    Raises:
        OSError: it is missing, unreadable, no regular file, another user's, or writable by others.
    """
    # Do not follow links, nor wait for a pipe. Windows has neither flag, and protects files in its own way.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, os.O_RDONLY | flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is not a regular file.")
        if hasattr(os, "geteuid") and found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} belongs to another user.")
        if hasattr(os, "geteuid") and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path} can be written by others: chmod go-w.")
        return file.read()


def write_own(path: Path, content: bytes) -> None:
    """Write a file that `read_own` accepts, atomically. Raises OSError."""
    write_atomically(path, content, private=True)


def write_atomically(path: Path, content: bytes | memoryview, *, private: bool = False) -> None:
    """Write `content` so that readers see the old file or the new one. Raises OSError.

    No other user may read or write a `private` file; others have the permissions that the process gives new files.
    """
    with replacing(path) as temporary, open(temporary, "xb", opener=_private if private else None) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, in the folder of `path`, which it replaces at the end of the context.

    If the context ends by an exception, the old file stays, and what was written is removed.
    """
    temporary = temporary_for(path)
    temporary.unlink(missing_ok=True)  # of a process of the same id that was killed
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_all(*paths: Path) -> Iterator[Path]:
    """A folder to write files to, which replace those of the same names in `paths` at the end of the context.

    They are replaced in the order given, so files come before those that refer to them. If the context ends by an
    exception, the old files stay.
    """
    folder = temporary_for(paths[-1])
    rmtree(folder, ignore_errors=True)  # as above
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in paths:
            publish(folder / path.name, path)
    finally:
        rmtree(folder)


def temporary_for(path: Path) -> Path:
    """The hidden path on the same disk that this process writes before the file gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name once its contents are on disk. Raises OSError."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
