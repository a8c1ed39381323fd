"""A file of keys that changes while it is in use."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from server.access import keys
from server.access.key_file import KeyFile
from server.access.keys import KeyFileError
from tests.support.bare_server import wait_until

FIRST, SECOND = keys.new_key(), keys.new_key()
LOGGER = "server.access.key_file"


def lines(name: str, key: str) -> str:
    return keys.entry(name, key, admin=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(lines("first", FIRST))
    path.chmod(0o644)
    return path


def name_of(file: KeyFile, key: str) -> str | None:
    found = file.find(key)
    return found.name if found else None


def test_a_changed_file_counts(path: Path) -> None:
    file = KeyFile(path)
    path.write_text(lines("second", SECOND))
    assert (name_of(file, FIRST), name_of(file, SECOND)) == ("first", None)
    file.reload()
    assert (name_of(file, FIRST), name_of(file, SECOND)) == (None, "second")


def test_a_change_is_seen_whatever_the_times_say(path: Path) -> None:
    """The same size, inode and times: as two writes within one tick of the clock leave them."""
    file = KeyFile(path)
    before = path.stat()
    path.write_text(lines("first", SECOND))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    file.reload()
    assert (name_of(file, FIRST), name_of(file, SECOND)) == (None, "first")


@pytest.mark.parametrize("broken", [b"", b"[[keys]", b"\xff", b"# empty"])
def test_a_broken_file_changes_nothing_and_is_reported_once(
    path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(path)
    path.write_bytes(broken)
    for _ in range(3):
        file.reload()
    assert name_of(file, FIRST) == "first"
    (record,) = [record for record in caplog.records if record.name == LOGGER]
    assert record.levelname == "ERROR"
    assert "stay valid" in record.getMessage()
    path.write_text(lines("second", SECOND))
    file.reload()
    assert (name_of(file, FIRST), name_of(file, SECOND)) == (None, "second")


def test_a_file_that_is_gone_is_reported_once_and_taken_when_it_is_back(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(path)
    content = path.read_bytes()
    path.unlink()
    for _ in range(3):
        file.reload()
    assert [record.levelname for record in caplog.records if record.name == LOGGER] == ["ERROR"]
    path.write_bytes(content)
    file.reload()
    assert name_of(file, FIRST) == "first"


def test_a_thread_looks_at_the_file(path: Path) -> None:
    file = KeyFile(path, every=0.01)
    file.watch()
    try:
        replacement = path.with_suffix(".new")
        replacement.write_text(lines("second", SECOND))
        replacement.replace(path)
        wait_until(lambda: name_of(file, SECOND) == "second")
        assert name_of(file, FIRST) is None
    finally:
        file.close()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "keys"])


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "large"])
def test_a_start_without_keys_says_how_to_make_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.toml"
    match kind:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "large":
            path.write_bytes(b"#" * 5_000_000)
    with pytest.raises(KeyFileError, match=r"python -m server.access NAME --file .* adds a key"):
        KeyFile(path)


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o644, False), (0o666, True)])
def test_only_files_that_others_can_write_are_warned_of(
    path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path.chmod(mode)
    KeyFile(path)
    assert bool([record for record in caplog.records if "chmod o-w" in record.getMessage()]) == warns
