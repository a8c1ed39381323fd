"""The files of a bundle, each opened once: what is hashed is what is read, and changes later are noticed.

Where a library maps a file that it opens by its path, `check_unchanged` after loading says whether that was the file
that was hashed, and while the mapping serves `check_contents` says whether it still is.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from engines.errors import BundleError
from engines.files import open_regular
from engines.manifest_fields import File

_TICK = 20_000_000  # nanoseconds; file systems stamp with the kernel's tick, 10 ms at most


class _State(NamedTuple):
    """What changes with a file's contents, or where another file takes its name."""

    device: int
    inode: int
    size: int
    written: int  # nanoseconds
    changed: int  # nanoseconds; unlike the other, programs cannot set it

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class HeldFile:
    """One file of a bundle, open."""

    def __init__(self, bundle: Path, file: File) -> None:
        """Raises BundleError where it is missing, no regular file, outside `bundle`, or of another size."""
        self.path = bundle / file.path
        self._file = file
        self._descriptor = _open(self.path, bundle)
        self._state = self._state_now()  # before the first byte is read
        if self._state.size != file.size:
            os.close(self._descriptor)
            raise BundleError(
                f"{self.path} has {self._state.size} bytes, and {file.size} were built: "
                "copy the whole bundle again, or build it again."
            )
        _wait_for_the_next_tick(self._state.changed)

    def verify(self) -> None:
        """Raise BundleError unless the file has the hash of the one that was built."""
        if not self._has_its_hash():
            raise self._altered()

    def read(self) -> bytes:
        """The contents, which have the hash. Raises BundleError."""
        with self._from_the_start() as file:
            content = file.readall()
        if hashlib.sha256(content).hexdigest() != self._file.sha256:
            raise self._altered()
        return content

    def check_unchanged(self) -> None:
        """Raise BundleError unless the path leads to this file, and nothing was written to it since it was opened."""
        try:
            named = _State.of(os.stat(self.path))
        except OSError as error:
            raise BundleError(
                f"{self.path} disappeared while it was loaded ({error.strerror}): start again."
            ) from error
        if not named == self._state == self._state_now():
            raise BundleError(f"{self.path} was changed or replaced while it was loaded: start again.")

    def check_contents(self) -> None:
        """Raise BundleError if the contents have changed. Hashes them where the file's times or size are others.

        Another file of the same name is no change: this one is still there for those who opened it.
        """
        now = self._state_now()
        if now == self._state:
            return
        if now.size != self._file.size or not self._has_its_hash():
            raise BundleError(f"{self.path} was altered while it was served from: images may be wrong since.")
        self._state = now

    def close(self) -> None:
        os.close(self._descriptor)

    def _state_now(self) -> _State:
        return _State.of(os.fstat(self._descriptor))

    def _has_its_hash(self) -> bool:
        with self._from_the_start() as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._file.sha256

    def _from_the_start(self) -> io.FileIO:
        file = io.FileIO(self._descriptor, closefd=False)
        file.seek(0)
        return file

    def _altered(self) -> BundleError:
        return BundleError(
            f"{self.path} is not the file that was built (sha256 differs): it is not loaded. Build again."
        )


class HeldFiles:
    """Files of a bundle, open until `close`. A context manager. Safe for several threads."""

    def __init__(self, bundle: Path, files: Iterable[File]) -> None:
        """Open `files`. Raises BundleError, as `HeldFile`, naming the first that is not there as it was built."""
        self._lock = threading.Lock()
        self._held: dict[Path, HeldFile] = {}
        try:
            for file in files:
                self._held[bundle / file.path] = HeldFile(bundle, file)
        except BundleError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self, *, later: Iterable[Path] = ()) -> None:
        """Hash every file, but those that are read `later`. Raises BundleError, naming the first that differs."""
        left_out = set(later)
        for path, file in self._held.items():
            if path not in left_out:
                file.verify()

    def read(self, path: Path) -> bytes:
        """The contents of the file at `path`, from memory that was hashed. Raises BundleError."""
        return self._held[path].read()

    def check_unchanged(self) -> None:
        """Call it when the files have been loaded by their paths. Raises BundleError, as that of `HeldFile`."""
        for file in self._held.values():
            file.check_unchanged()

    def check_contents(self) -> None:
        """Call it now and then. Raises BundleError where a file was altered."""
        with self._lock:
            for file in self._held.values():
                file.check_contents()

    def keep(self, paths: Iterable[Path]) -> None:
        """Close all files but those at `paths`."""
        kept = set(paths)
        with self._lock:
            for path in self._held.keys() - kept:
                self._held.pop(path).close()

    def close(self) -> None:
        self.keep(())


def _wait_for_the_next_tick(changed: int) -> None:
    """Return when a write to a file that was `changed` then, in nanoseconds, gets another time."""
    age = time.time_ns() - changed
    if 0 <= age < _TICK:
        time.sleep((_TICK - age) / 1e9)


def are_intact(bundle: Path, files: Iterable[File]) -> bool:
    """Whether `files` of the bundle in folder `bundle` are there, and are those that were built."""
    try:
        with HeldFiles(bundle, files) as held:
            held.verify()
    except BundleError:
        return False
    return True


def _open(path: Path, bundle: Path) -> int:
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(bundle.resolve()):
            raise BundleError(f"{path} leads out of the bundle, to {real}: copy the file itself into the bundle.")
        return open_regular(real)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: copy the whole bundle again, or build it again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundleError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
