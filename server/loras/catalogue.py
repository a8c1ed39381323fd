"""The folder of LoRAs: which files it has, and what they are called. Reads no contents.

A file is named by its path below the folder, without its suffix: `styles/ink`. One that PEFT or diffusers has written
to a folder of its own has the name of that folder. Requests may leave out the folders where a name is clear without.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from server.requests.errors import LoraUnreadable
from server.requests.lora_tags import can_be_named
from server.requests.loras import UnusableLora

_SUFFIX = ".safetensors"
_CONFIG = "adapter_config.json"  # of PEFT, beside a file
_NAMED_BY_FOLDER = ("adapter_model", "pytorch_lora_weights")  # of PEFT, and of diffusers
_DEEPEST = 6  # folders
_MOST_FILES = 10_000
_PROPOSED = 3  # names that an error proposes
_LONGEST_COMPARED = 100  # characters
_UNNAMEABLE = "{}: a tag cannot have this name: rename the file, without : < > and signs that are not printed."
_COARSEST_CLOCK = 2_000_000_000  # nanoseconds between two times that a file system tells apart, at most


class Stamp(NamedTuple):
    """What changes with the contents of a file."""

    size: int  # bytes
    modified: int  # ns
    changed: int  # ns
    inode: int
    config: int = 0  # ns at which PEFT's config beside it was modified; 0 without one


@dataclass(frozen=True, slots=True)
class CataloguedFile:
    """A file of the folder."""

    name: str
    path: Path
    stamp: Stamp
    problem: str = ""  # why requests cannot name it, in a sentence


class _Listing:
    """The files of the folder at one time."""

    def __init__(self, files: Sequence[CataloguedFile], folders: Mapping[Path, int], at: int) -> None:
        """`folders` are those that were read, by when each was modified, and `at` when the first was read; in ns."""
        self.files = {file.name: file for file in files}
        self._folders = folders
        self._at = at
        self._short = defaultdict[str, list[str]](list)
        for name in self.files:
            self._short[name.rpartition("/")[2]].append(name)

    def find(self, name: str) -> CataloguedFile | None:
        """The file of this name, or the only one that has it below some folder."""
        names = [name] if name in self.files else self._short.get(name, [])
        return self.files[names[0]] if len(names) == 1 else None

    def why_not(self, name: str) -> str:
        """Why `find` finds nothing, and what to write instead."""
        shown = name if name.isprintable() and len(name) <= _LONGEST_COMPARED else ascii(name)[:_LONGEST_COMPARED]
        if several := self._short.get(name):
            return f"There are several LoRAs {shown}: write one of {', '.join(several[:_PROPOSED])}."
        close = self._close_to(name)
        advice = f"did you mean {' or '.join(close)}?" if close else "GET /loras lists those there are."
        return f"There is no LoRA {shown}: {advice}"

    def _close_to(self, name: str) -> Sequence[str]:
        known = {short: names[0] for short, names in self._short.items()} | {name: name for name in self.files}
        found = difflib.get_close_matches(name[:_LONGEST_COMPARED], known, n=_PROPOSED)
        return list(dict.fromkeys(known[close] for close in found))

    def is_current(self) -> bool:
        """Whether files were neither added nor removed since, as far as the times of folders tell."""
        try:
            return bool(self._folders) and all(
                path.stat().st_mtime_ns == modified < self._at - _COARSEST_CLOCK
                for path, modified in self._folders.items()
            )
        except OSError:
            return False


class Catalogue:
    """Looks files up by the names of requests, which are never joined to a path. For any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._listing = _Listing((), {}, 0)

    def files(self) -> Sequence[CataloguedFile]:
        """Read the folder, and return its files by name. Raises LoraUnreadable."""
        with self._lock:
            self._listing = self._read()
            return sorted(self._listing.files.values(), key=lambda file: file.name)

    def find(self, name: str) -> CataloguedFile:
        """The file of a name, as it is now.

        Raises:
            UnusableLora: there is none, or several.
            LoraUnreadable: the folder cannot be read.
        """
        wanted = _normal(name.strip())
        wanted = wanted[: -len(_SUFFIX)] if wanted.lower().endswith(_SUFFIX) else wanted
        found = self._now(wanted)
        if found is None:
            self._refresh()
            found = self._now(wanted)
        if found is None:
            raise UnusableLora(self._listing.why_not(wanted))
        if found.problem:
            raise UnusableLora(found.problem)
        return found

    def _now(self, name: str) -> CataloguedFile | None:
        """The file of the listing, as it is now; None if there is none, or no longer."""
        found = self._listing.find(name)
        stamp = found and _stamp(found.path, within=self._folder.resolve())
        return replace(found, stamp=stamp) if found and stamp else None

    def _refresh(self) -> None:
        with self._lock:
            if not self._listing.is_current():
                self._listing = self._read()

    def _read(self) -> _Listing:
        """Raises LoraUnreadable."""
        at = time.time_ns()
        folders: dict[Path, int] = {}
        try:
            os.scandir(self._folder).close()
        except OSError as error:
            raise LoraUnreadable(f"The folder of LoRAs cannot be read now ({error.strerror}): try again.") from error
        root = self._folder.resolve()
        paths = [path for _, path in zip(range(_MOST_FILES), _walk(self._folder, root, folders), strict=False)]
        return _Listing(list(_named(paths, self._folder, root)), folders, at)


def _walk(folder: Path, root: Path, folders: dict[Path, int], depth: int = 0) -> Iterator[Path]:
    """The .safetensors files below `folder`. Links are followed within `root`, and each folder is read once."""
    try:
        real = folder.resolve(strict=True)
        if real in folders or depth > _DEEPEST or not real.is_relative_to(root):
            return
        folders[real] = real.stat().st_mtime_ns
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # it may have been removed meanwhile, or is not ours to read
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(_SUFFIX):
            yield path
        elif path.is_dir():
            yield from _walk(path, root, folders, depth + 1)


def _named(paths: Sequence[Path], folder: Path, root: Path) -> Iterator[CataloguedFile]:
    """The files with their names; where two have the same, the second is refused."""
    taken: dict[str, Path] = {}
    own = {path.relative_to(folder).with_suffix("").as_posix() for path in paths}
    for path in paths:
        stamp = _stamp(path, within=root)
        if stamp is None:
            continue
        name = _name(path.relative_to(folder).with_suffix(""), own, taken)
        shown = _normal(name.encode(errors="replace").decode())
        problem = "" if can_be_named(shown) and shown == _normal(name) else _UNNAMEABLE.format(ascii(shown))
        if shown in taken:
            shown, problem = f"{shown}{path.suffix}", f"There are two LoRAs {shown}: rename one of the files."
        taken[shown] = path
        yield CataloguedFile(shown, path, stamp, problem)


def _name(path: Path, own: set[str], taken: Mapping[str, Path]) -> str:
    """The name of a file, of which `path` is below the folder and without its suffix."""
    parent = path.parent.as_posix()
    if path.name in _NAMED_BY_FOLDER and parent != "." and parent not in own and parent not in taken:
        return parent
    return path.as_posix()


def _stamp(path: Path, *, within: Path) -> Stamp | None:
    """None where there is no such file, or a link leads out of the folder."""
    try:
        if not path.resolve(strict=True).is_relative_to(within) or not path.is_file():
            return None
        status = path.stat()
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return None
    config = path.with_name(_CONFIG)
    try:
        configured = config.stat().st_mtime_ns
    except OSError:
        configured = 0
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, configured)


def _normal(name: str) -> str:
    """Unicode has several spellings of é; file systems and keyboards choose different ones."""
    return unicodedata.normalize("NFC", name)
