"""Jobs in a file, by SQLAlchemy over SQLite: they outlive the process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import StaticPool

from engines.errors import EngineError
from server.jobs.job import Facts, Job, Key, Recipe
from server.jobs.store import OVERHEAD, Counts, Limits
from server.requests.errors import StorageFailed
from server.requests.schemas import GenerateRequest

_VERSION = 1  # of the schema
_APPLICATION = 0x6C617464  # "latd", which tells the file from those of other programs
_BUSY_SECONDS = 1
_RETRY_AFTER = 30  # seconds
_FILES = ("image", "mask")  # fields of a body that are stored as they are

_TABLES = MetaData()
_JOBS = Table(
    "jobs",
    _TABLES,
    Column("number", Integer, primary_key=True),  # in the order in which they came
    Column("id", String, nullable=False, unique=True),
    Column("owner", String),
    Column("facts", String, nullable=False),  # JSON
    Column("key_caller", String),
    Column("key_name", String),
    Column("key_fingerprint", String),
    Column("body", String),  # JSON, without files; NULL once the job has ended, as these are:
    Column("image", LargeBinary),
    Column("mask", LargeBinary),
    Column("caller", String, nullable=False),
    Column("api", String, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("ended", Float, index=True),  # seconds since 1970
    Column("size", Integer, nullable=False),  # bytes
    UniqueConstraint("key_caller", "key_name"),
    sqlite_autoincrement=True,
)
_IMAGES = Table(
    "images",
    _TABLES,
    Column("job", ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
_AS_JOB = (_JOBS.c.id, _JOBS.c.owner, _JOBS.c.facts, _JOBS.c.key_caller, _JOBS.c.key_name, _JOBS.c.key_fingerprint)


class Database:
    """A store in an SQLite file, which no other process can use meanwhile."""

    persistent = True

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        """Open the file, or create it for its owner alone. Raises EngineError, with what to do about it."""
        self.limits = limits or Limits()
        self.counts = Counts()
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.engine = _open(path)
            self._count()
        except OSError as error:
            raise EngineError(f"The jobs database {path}: {error.strerror}: choose another --jobs-database.") from error
        except DatabaseError as error:
            raise EngineError(f"The jobs database {path} {_why(error)}") from error

    def add(self, job: Job, recipe: Recipe) -> None:
        key = job.key
        body = recipe.body
        row = {
            "id": job.id,
            "owner": job.owner,
            "facts": job.facts.model_dump_json(),
            "key_caller": key and key.caller,
            "key_name": key and key.name,
            "key_fingerprint": key and key.fingerprint,
            "body": body.model_dump_json(exclude_unset=True, exclude={*_FILES}),
            "image": body.image,
            "mask": body.mask,
            "caller": recipe.caller,
            "api": recipe.api,
            "starts": 0,
            "size": OVERHEAD,
        }
        with self._writing() as connection:
            connection.execute(insert(_JOBS), row)
            self._evict(connection)

    def start(self, job_id: str, count: int = 1) -> None:
        with self._writing() as connection:
            connection.execute(update(_JOBS).where(_JOBS.c.id == job_id).values(starts=_JOBS.c.starts + count))

    def finish(self, job_id: str, facts: Facts, images: Sequence[bytes] = ()) -> None:
        with self._writing() as connection:
            query = select(_JOBS.c.number).where(_JOBS.c.id == job_id, _JOBS.c.ended.is_(None))
            number = connection.scalar(query)
            if number is None:
                return
            ending = {"facts": facts.model_dump_json(), "ended": self.limits.clock()}
            size = OVERHEAD + sum(map(len, images))
            connection.execute(
                update(_JOBS)
                .where(_JOBS.c.number == number)
                .values(**ending, size=size, body=None, image=None, mask=None)
            )
            for index, content in enumerate(images):
                connection.execute(insert(_IMAGES), {"job": number, "number": index, "content": content})
            self._evict(connection)

    def get(self, job_id: str) -> Job | None:
        return self._one(_JOBS.c.id == job_id)

    def find(self, caller: str, key: str) -> Job | None:
        return self._one((_JOBS.c.key_caller == caller) & (_JOBS.c.key_name == key))

    def list(self, owner: str | None, limit: int) -> list[Job]:
        query = select(*_AS_JOB).where(self._is_current()).order_by(_JOBS.c.number.desc()).limit(limit)
        if owner is not None:
            query = query.where(_JOBS.c.owner == owner)
        with self._reading() as connection:
            return [_job(row) for row in connection.execute(query)]

    def image(self, job_id: str, index: int) -> bytes | None:
        query = select(_IMAGES.c.content).join(_JOBS).where(_JOBS.c.id == job_id, _IMAGES.c.number == index)
        with self._reading() as connection:
            return connection.scalar(query.where(self._is_current()))

    def remove(self, job_id: str) -> None:
        with self._writing() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.id == job_id))

    def expire(self) -> None:
        with self._writing() as connection:
            removed = connection.execute(delete(_JOBS).where(~self._is_current()))
        self.counts.expired += removed.rowcount

    def unfinished(self) -> Sequence[Job]:
        query = select(*_AS_JOB).where(_JOBS.c.ended.is_(None)).order_by(_JOBS.c.number)
        with self._reading() as connection:
            return [_job(row) for row in connection.execute(query)]

    def recipe(self, job_id: str) -> tuple[Recipe, int] | None:
        query = select(_JOBS).where(_JOBS.c.id == job_id, _JOBS.c.ended.is_(None))
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        body = GenerateRequest.model_validate_json(row.body)
        files = {name: content for name in _FILES if (content := getattr(row, name)) is not None}
        return Recipe(body.model_copy(update=files), row.caller, row.api), row.starts

    def close(self) -> None:
        self.engine.dispose()

    def _one(self, condition: Any) -> Job | None:
        with self._reading() as connection:
            row = connection.execute(select(*_AS_JOB).where(condition, self._is_current())).one_or_none()
        return row and _job(row)

    def _is_current(self) -> Any:
        """The condition that a job has not expired."""
        return _JOBS.c.ended.is_(None) | (_JOBS.c.ended > self.limits.clock() - self.limits.seconds)

    def _evict(self, connection: Connection) -> None:
        """Remove the oldest, but not the one that ended last."""
        jobs, size = _totals(connection)
        if jobs <= self.limits.jobs and size <= self.limits.size:
            return
        ended = select(_JOBS.c.number, _JOBS.c.size).where(_JOBS.c.ended.is_not(None))
        oldest_first = connection.execute(ended.order_by(_JOBS.c.ended, _JOBS.c.number)).all()
        for row in oldest_first[:-1]:
            if jobs <= self.limits.jobs and size <= self.limits.size:
                return
            connection.execute(delete(_JOBS).where(_JOBS.c.number == row.number))
            jobs, size = jobs - 1, size - row.size
            self.counts.evicted += 1

    def _count(self) -> None:
        with self.engine.connect() as connection:
            self.counts.jobs, self.counts.size = _totals(connection)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction. Raises StorageFailed."""
        try:
            with self.engine.begin() as connection:
                yield connection
            self._count()
        except DatabaseError as error:
            raise self._failed(error) from error

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            raise self._failed(error) from error

    def _failed(self, error: DatabaseError) -> StorageFailed:
        return StorageFailed(
            f"The database of jobs cannot be used ({error.orig}): try again later, or send the request without a job.",
            retry_after=_RETRY_AFTER,
        )


def _open(path: Path) -> Engine:
    options = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
    engine = create_engine(f"sqlite:///{path}", poolclass=StaticPool, connect_args=options)
    event.listen(engine, "connect", _prepare)
    try:
        with engine.begin() as connection:
            _create(connection, path)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _prepare(connection: Any, _record: object) -> None:
    """Take the file for this process alone, until the connection is closed."""
    for statement in (
        "PRAGMA locking_mode = EXCLUSIVE",
        "PRAGMA auto_vacuum = FULL",  # what is removed leaves the file; without effect on one that has tables
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",  # an accepted job outlives a power failure too
        "PRAGMA foreign_keys = ON",
        "BEGIN EXCLUSIVE",
        "COMMIT",
    ):
        connection.execute(statement)


def _create(connection: Connection, path: Path) -> None:
    """Check the file, and create the tables if it is new. Raises EngineError."""
    pragma: Callable[[str], Any] = lambda text: connection.exec_driver_sql(f"PRAGMA {text}").scalar()  # noqa: E731
    if (verdict := pragma("quick_check(1)")) != "ok":
        raise EngineError(
            f"The jobs database {path} is damaged ({verdict.splitlines()[-1]}): move it away, and start again."
        )
    version, application = pragma("user_version"), pragma("application_id")
    if version == 0 and not pragma("schema_version"):
        _TABLES.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {_VERSION}")
        connection.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION}")
    elif application != _APPLICATION:
        raise EngineError(f"The jobs database {path} belongs to another program: choose another --jobs-database.")
    elif version != _VERSION:
        raise EngineError(
            f"The jobs database {path} has version {version}, this server reads version {_VERSION}: move it away."
        )


def _totals(connection: Connection) -> tuple[int, int]:
    """How many jobs there are, and their bytes."""
    jobs, size = connection.execute(select(func.count(), func.coalesce(func.sum(_JOBS.c.size), 0))).one()
    return jobs, size


def _job(row: Row[*tuple[Any, ...]]) -> Job:
    key = None if row.key_name is None else Key(row.key_caller, row.key_name, row.key_fingerprint)
    return Job(row.id, row.owner, Facts.model_validate_json(row.facts), key)


def _why(error: DatabaseError) -> str:
    """What is wrong with the file, and what to do about it."""
    reason = str(error.orig)
    if "locked" in reason:
        return "is in use by another process: stop it, or choose another --jobs-database."
    if "not a database" in reason or "malformed" in reason:
        return f"is damaged ({reason}): move it away, and start again."
    return f"cannot be opened ({reason}): choose another --jobs-database."
