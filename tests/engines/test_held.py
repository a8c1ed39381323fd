"""Files that are held open are read as they were hashed, and every change since is noticed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BundleError
from engines.held import HeldFiles, are_intact
from engines.manifest import File

CONTENT = b"weights" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(CONTENT)
    return tmp_path / "weights"


@pytest.fixture
def held(path: Path) -> Iterator[HeldFiles]:
    with HeldFiles(path.parent, [File.of(path, root=path.parent)]) as files:
        files.verify()
        yield files


def flip(path: Path) -> None:
    """Change a byte and restore the time, as somebody who hides would."""
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 10)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(CONTENT.upper())
    other.replace(path)


def replace_and_restore(path: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.write_bytes(CONTENT.upper())
    kept.replace(path)


@pytest.mark.parametrize("change", [flip, cut, replace, replace_and_restore, Path.unlink])
def test_a_change_while_loading_is_refused(held: HeldFiles, path: Path, change: Callable[[Path], None]) -> None:
    held.check_unchanged()
    change(path)
    with pytest.raises(BundleError, match=r"weights (was changed or replaced|disappeared) while it was loaded"):
        held.check_unchanged()


@pytest.mark.parametrize("change", [flip, cut])
def test_altered_contents_are_noticed_while_they_are_used(
    held: HeldFiles, path: Path, change: Callable[[Path], None]
) -> None:
    held.check_contents()
    change(path)
    with pytest.raises(BundleError, match="weights was altered while it was served from"):
        held.check_contents()
    with pytest.raises(BundleError, match="weights is not the file that was built"):
        held.read(path)


@pytest.mark.parametrize(
    "change", [replace, replace_and_restore, Path.unlink, Path.touch, lambda path: path.chmod(0o600)]
)
def test_what_is_held_stays_what_it_was(held: HeldFiles, path: Path, change: Callable[[Path], None]) -> None:
    """A new build replaces files: the old ones are still there for those who opened them."""
    change(path)
    held.check_contents()
    assert held.read(path) == CONTENT


def test_hashes_are_taken_once_unless_the_file_was_touched(
    held: HeldFiles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.append(name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    held.check_contents()
    assert not hashed
    path.touch()
    held.check_contents()
    held.check_contents()
    assert hashed == ["sha256"]


def test_what_is_read_later_is_hashed_later(path: Path) -> None:
    with HeldFiles(path.parent, [File(path="weights", size=len(CONTENT), sha256="0" * 64)]) as files:
        files.verify(later=[path])
        with pytest.raises(BundleError, match="sha256 differs"):
            files.read(path)
        with pytest.raises(BundleError, match="sha256 differs"):
            files.verify()


def test_descriptors_are_closed(path: Path) -> None:
    file = File.of(path, root=path.parent)
    before = len(os.listdir("/proc/self/fd"))
    with HeldFiles(path.parent, [file]) as files:
        assert len(os.listdir("/proc/self/fd")) == before + 1
        files.keep([path])
        assert files.read(path) == CONTENT
    with pytest.raises(BundleError, match="absent is missing"):
        HeldFiles(path.parent, [file, File(path="absent", size=0, sha256=SHA)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_are_intact_or_not(path: Path) -> None:
    file = File.of(path, root=path.parent)
    assert are_intact(path.parent, [file])
    flip(path)
    assert not are_intact(path.parent, [file])
    path.unlink()
    assert not are_intact(path.parent, [file])
