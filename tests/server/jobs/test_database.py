"""Jobs in a file: what the next process finds, and files that cannot be used."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import EngineError
from server.jobs.database import Database
from server.jobs.store import Limits
from server.requests.errors import StorageFailed
from tests.support.jobs import DONE, RECIPE, a_job


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def test_the_next_process_finds_what_was_stored(path: Path) -> None:
    first = Database(path)
    for name in ("3", "1", "2"):
        first.add(a_job(name, owner="amy", key=name), RECIPE)
    first.finish("1", DONE, [b"image"])
    first.start("2")
    first.close()
    second = Database(path)
    assert [job.id for job in second.unfinished()] == ["3", "2"], "in the order in which they came"
    assert second.unfinished()[0] == a_job("3", owner="amy", key="3")
    assert second.recipe("3") == (RECIPE, 0)
    assert second.recipe("2") == (RECIPE, 1)
    assert second.recipe("1") is None
    assert second.image("1", 0) == b"image"
    assert second.counts.jobs == 3
    second.close()


def test_it_is_for_its_owner_alone(path: Path) -> None:
    database = Database(path)
    database.add(a_job("1"), RECIPE)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"jobs.db": 0o600, "jobs.db-wal": 0o600}
    database.close()


def test_removed_images_leave_the_file(path: Path) -> None:
    database = Database(path, Limits(size=10**7))
    for name in "abcd":
        database.add(a_job(name), RECIPE)
        database.finish(name, DONE, [bytes(10**6)])
    for name in "abcd":
        database.remove(name)
    database.close()
    assert path.stat().st_size < 10**5


def test_a_damaged_file_is_named(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(EngineError, match=r"jobs\.db is damaged .*move it away"):
        Database(path)


def test_a_file_that_is_damaged_in_the_middle_is_named(path: Path) -> None:
    database = Database(path)
    for number in range(50):
        database.add(a_job(str(number)), RECIPE)
    database.close()
    content = bytearray(path.read_bytes())
    content[8192:16384] = b"\xa5" * 8192
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"jobs\.db is damaged .*move it away"):
        Database(path)


def test_a_file_of_another_program_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE jobs (id)")
    other.close()
    with pytest.raises(EngineError, match="another program"):
        Database(path)


def test_a_file_of_another_version_is_named(path: Path) -> None:
    Database(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(EngineError, match="version 99"):
        Database(path)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No such file or directory: choose another --jobs-database"):
        Database(tmp_path / "none" / "jobs.db")


def test_a_full_disk_refuses_jobs_and_keeps_those_that_are_stored(path: Path) -> None:
    database = Database(path)
    database.add(a_job("1"), RECIPE)
    database.finish("1", DONE, [b"image"])
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    large = replace(RECIPE, body=RECIPE.body.model_copy(update={"image": bytes(10**6)}))
    with pytest.raises(StorageFailed, match="full"):
        database.add(a_job("2"), large)
    assert database.image("1", 0) == b"image"
    database.close()


def test_a_backup_is_a_copy_of_the_closed_file(path: Path, tmp_path: Path) -> None:
    database = Database(path)
    database.add(a_job("1"), RECIPE)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        sqlite3.connect(path, timeout=0).execute("SELECT * FROM jobs")
    database.close()
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "what was in the log is in the file"
    check_restored(Path(shutil.copy(path, tmp_path / "backup.db")))


def test_a_snapshot_of_both_files_is_opened_as_after_a_power_failure(path: Path, tmp_path: Path) -> None:
    database = Database(path)
    database.add(a_job("1"), RECIPE)
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", tmp_path / f"snapshot.db{suffix}")
    database.close()
    check_restored(tmp_path / "snapshot.db")


def check_restored(path: Path) -> None:
    restored = Database(path)
    assert [job.id for job in restored.unfinished()] == ["1"]
    restored.close()
