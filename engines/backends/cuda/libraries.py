"""The CUDA libraries that a package's own libraries are linked to, found wherever they are installed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.backends.registry import install_command
from engines.errors import EngineError


@dataclass(frozen=True, slots=True)
class Library:
    """A library of CUDA or cuDNN."""

    soname: str  # what others link to; its number is the interface's, not the release's
    name: str  # in cuda-pathfinder
    folder: str = "cu13"  # in the namespace package `nvidia` of its wheel


def load_libraries(libraries: Sequence[Library], *, needed_by: str) -> None:
    """Load `libraries` into this process, each after those that it needs, so that later ones find them by soname.

    One that is loaded already is taken, such as torch's; then wheels in any folder of `sys.path`; then what
    cuda-pathfinder finds: conda, the linker's paths, CUDA_PATH, CUDNN_PATH.

    Raises:
        EngineError: names what is missing, and the command that installs it.
    """
    missing = [library.soname for library in libraries if not _load(library)]
    if missing:
        raise EngineError(
            f"{needed_by} needs {', '.join(missing)}, in no wheel and no CUDA toolkit here: {install_command('cuda')}"
        )


def _load(library: Library) -> bool:
    return _opens(library.soname, os.RTLD_NOLOAD) or _load_wheel(library) or _load_elsewhere(library)


def _load_wheel(library: Library) -> bool:
    files = (Path(entry, "nvidia", library.folder, "lib", library.soname) for entry in sys.path)
    return any(_opens(str(file)) for file in files if file.is_file())


def _load_elsewhere(library: Library) -> bool:
    from cuda.pathfinder import load_nvidia_dynamic_lib  # noqa: PLC0415 - an optional dependency

    try:
        load_nvidia_dynamic_lib(library.name)
    except RuntimeError:  # its own classes derive from it
        return False
    return _opens(library.soname)  # what it found may be of another CUDA


def _opens(file: str, mode: int = 0) -> bool:
    """Whether the linker opens `file`. It stays open: a library of CUDA cannot be unloaded."""
    try:
        ctypes.CDLL(file, mode=os.RTLD_GLOBAL | mode)
    except OSError:
        return False
    return True
