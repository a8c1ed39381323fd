"""TensorRT's timing cache: how long each kernel took in earlier builds, so that the next need not measure it again.

TensorRT for RTX has none: it chooses kernels on the GPU that runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.files import read_own, write_own


class Timings:
    """The timing cache of one build, from its file to its file.

    TensorRT accepts the timings of its own version and of this GPU alone. Without them, a build takes longer.
    """

    def __init__(self, config: Any, file: str, *, note: Callable[[str], None]) -> None:
        """Give `config` the timings in `file`, if there are some that can be used; `note` receives why not."""
        self._file = Path(file)
        self._note = note
        content = self._read()
        if not self._set(config, content):
            note(f"{file} is of another GPU or another version of TensorRT: all kernels are measured again.")
            self._set(config, b"")
        self.reused = self._count()

    def save(self) -> None:
        """Write what is known now: the timings that were reused, and those that the build measured."""
        if (content := self._timing_cache.serialize()) is None:
            return
        try:
            write_own(self._file, bytes(content))
        except OSError as error:
            self._note(f"{self._file} cannot be written, and the next build measures again: {error.strerror}.")

    def _set(self, config: Any, content: bytes) -> bool:
        """Whether TensorRT uses `content`. Empty content is a new cache."""
        self._timing_cache = timing_cache = config.create_timing_cache(content)
        return timing_cache is not None and bool(config.set_timing_cache(timing_cache, ignore_mismatch=False))

    def _read(self) -> bytes:
        try:
            return read_own(self._file)
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._note(f"{self._file} is not used, and all kernels are measured again: {error}")
            return b""

    def _count(self) -> int | None:
        try:
            return len(self._timing_cache.queryKeys())
        except RuntimeError:  # the documented error, without a reason
            return None
