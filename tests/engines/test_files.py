"""Files are written whole or not at all, alone or together."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

import pytest

from engines import files
from engines.files import replacing, replacing_all, sha256_of_code, temporary_for, write_atomically


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", memoryview(b"new")):
        write_atomically(path, content, private=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    """In containers each start may have the same process id."""
    path = tmp_path / "file"
    temporary_for(path).write_bytes(b"half")
    write_atomically(path, b"new")
    temporary_for(path).mkdir()
    (temporary_for(path) / "other").write_bytes(b"half")
    with replacing_all(path) as folder:
        (folder / path.name).write_bytes(b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_written_by_others_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_files_that_belong_together_are_replaced_in_order_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, graph = tmp_path / "graph.weights", tmp_path / "graph.onnx"
    graph.write_bytes(b"old")
    replaced: list[str] = []
    publish = files.publish

    def publishing(temporary: Path, path: Path) -> None:
        publish(temporary, path)
        replaced.append(path.name)

    monkeypatch.setattr(files, "publish", publishing)
    with pytest.raises(FileNotFoundError, match=r"graph\.weights"), replacing_all(weights, graph) as folder:
        (folder / graph.name).write_bytes(b"new")  # and no weights
    assert list(tmp_path.iterdir()) == [graph]
    assert graph.read_bytes() == b"old"
    with replacing_all(weights, graph) as folder:
        for path in (graph, weights):
            (folder / path.name).write_bytes(b"new")
    assert replaced == ["graph.weights", "graph.onnx"]
    assert sorted(tmp_path.iterdir()) == [graph, weights]


def test_a_hash_over_code_names_files_and_their_contents(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    module = tmp_path / "package" / "module.py"
    module.write_text("a = 1")
    before = sha256_of_code([tmp_path / "package"])
    (tmp_path / "package" / "notes.txt").write_text("no code")
    assert sha256_of_code([tmp_path / "package"]) == before
    module.write_text("a = 2")
    changed = sha256_of_code([tmp_path / "package"])
    module.rename(module.with_name("other.py"))
    assert len({before, changed, sha256_of_code([tmp_path / "package"])}) == 3


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    """As on a full disk: the size of files is limited for a moment."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
