"""What is made once for all processes of a run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.shared import made_once


def test_the_first_makes_it_and_the_others_wait(tmp_path_factory: pytest.TempPathFactory) -> None:
    begun, calls = threading.Barrier(4), []
    tmp_path_factory.getbasetemp()  # pytest makes it at first use, and not for threads at once

    def make(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "file").write_text("made")

    def ask(_: int) -> str:
        begun.wait()
        return (made_once(tmp_path_factory, "of-this-test", make) / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["made"] * 4
    assert len(calls) == 1


def test_what_failed_is_made_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        made_once(tmp_path_factory, "failing", fail)
    assert made_once(tmp_path_factory, "failing", Path.mkdir).is_dir()
