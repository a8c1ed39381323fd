"""The file of API keys, read again when it changes."""

from __future__ import annotations

import logging
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from server.access import keys
from server.access.keys import KeyFileError
from server.requests.context import Caller

_EVERY = 1.0  # seconds between looks at the file
_LARGEST = 4 * 1024 * 1024  # bytes
_log = logging.getLogger(__name__)


class KeyFile:
    """The callers in a file. For any thread."""

    def __init__(self, path: Path, *, every: float = _EVERY) -> None:
        """Read the file.

        Raises:
            KeyFileError: it cannot be used, and how to make one that can.
        """
        self._path = path
        self._every = every
        self._stopped = threading.Event()
        self._seen = self._look()
        try:
            self._callers = _callers(self._seen)
        except KeyFileError as error:
            advice = f"`python -m server.access NAME --file {path}` adds a key"
            raise KeyFileError(f"--api-keys {path}: {error}; {advice}.") from None
        self._warn_of_writers()

    def find(self, key: str) -> Caller | None:
        """The caller that `key` belongs to."""
        return keys.find(self._callers, key)

    def watch(self) -> None:
        """Look at the file every second, in a thread, until `close`."""
        threading.Thread(target=self._watch, name="keys", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()

    def reload(self) -> None:
        """Take the keys of a file that has changed; those of before stay valid if it cannot be used.

        Contents are compared: two changes within one tick of the file system's clock leave the same time.
        """
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._callers = _callers(seen)  # one assignment: requests find the keys before it, or these
        except KeyFileError as error:
            _log.error("%s: %s. The previous API keys stay valid: correct the file.", self._path, error)
        else:
            _log.info("%s has changed: it has %d API keys", self._path, len(self._callers))

    def _watch(self) -> None:
        while not self._stopped.wait(self._every):
            self.reload()

    def _look(self) -> bytes | KeyFileError:
        """What is in the file, or why that cannot be read."""
        try:
            status = self._path.stat()
            if not stat.S_ISREG(status.st_mode):
                return _Unreadable("it is not a file")
            if status.st_size > _LARGEST:
                return _Unreadable(f"it is larger than {_LARGEST} bytes")
            return self._path.read_bytes()
        except OSError as error:
            return _Unreadable(str(error.strerror))

    def _warn_of_writers(self) -> None:
        """Those who can read hashes cannot do anything with them; those who can write them can add keys."""
        if self._path.stat().st_mode & stat.S_IWOTH:
            _log.warning("everyone on this machine can add API keys: chmod o-w %s", self._path)


class _Unreadable(KeyFileError):
    """Why the file cannot be read: equal where the reason is."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unreadable) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


def _callers(seen: bytes | KeyFileError) -> Mapping[str, Caller]:
    if isinstance(seen, KeyFileError):
        raise seen
    return keys.parse(seen)
