"""What every store of jobs does, held against each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.jobs.database import Database
from server.jobs.job import StoredError
from server.jobs.store import OVERHEAD, JobStore, Limits, MemoryStore
from server.requests.errors import Cancelled, FieldError, InvalidRequest
from tests.support.jobs import DONE, FACTS, RECIPE, a_job

Make = Callable[..., JobStore]


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stores:
    """Makes stores of one kind, with a clock that the test sets."""

    kind: str
    folder: Path
    clock: Clock = field(default_factory=Clock)
    opened: list[JobStore] = field(default_factory=list)

    def __call__(self, *, seconds: float = 100, size: int = 10**6, jobs: int = 100) -> JobStore:
        limits = Limits(seconds, size, jobs, self.clock)
        store: JobStore = MemoryStore(limits) if self.kind == "memory" else Database(self.folder / "jobs.db", limits)
        self.opened.append(store)
        return store


@pytest.fixture(params=["memory", "database"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    made = Stores(request.param, tmp_path)
    yield made
    for store in made.opened:
        store.close()


def test_a_job_is_found_by_its_id_and_its_key(stores: Stores) -> None:
    store = stores()
    job = a_job("one", owner="amy", key="k-1")
    store.add(job, RECIPE)
    assert store.get("one") == store.find("192.0.2.1", "k-1") == job
    assert [store.get("two"), store.find("192.0.2.1", "k-2"), store.find("192.0.2.2", "k-1")] == [None] * 3


def test_a_job_ends_once_with_its_images(stores: Stores) -> None:
    store = stores()
    store.add(a_job("one"), RECIPE)
    store.finish("one", DONE, [b"first", b"second"])
    store.finish("one", FACTS.failed(Cancelled("too late")))
    found = store.get("one")
    assert found is not None
    assert found.facts == DONE
    assert [store.image("one", index) for index in (0, 1, 2)] == [b"first", b"second", None]
    assert store.counts.size == OVERHEAD + len(b"firstsecond")


def test_what_is_gone_is_no_error(stores: Stores) -> None:
    store = stores()
    store.remove("one")
    store.finish("one", DONE)
    store.start("one")
    assert (store.image("one", 0), store.recipe("one")) == (None, None)
    assert (store.counts.jobs, store.counts.size) == (0, 0)


def test_a_removed_job_frees_its_key(stores: Stores) -> None:
    store = stores()
    store.add(a_job("one", key="k"), RECIPE)
    store.finish("one", DONE, [b"image"])
    store.remove("one")
    assert (store.get("one"), store.image("one", 0), store.find("192.0.2.1", "k")) == (None, None, None)
    assert (store.counts.jobs, store.counts.size) == (0, 0)
    store.add(a_job("two", key="k"), RECIPE)


def test_jobs_expire_after_their_end(stores: Stores) -> None:
    store = stores(seconds=10)
    for name in ("ended", "later", "running"):
        store.add(a_job(name), RECIPE)
    store.finish("ended", DONE, [b"image"])
    stores.clock.now += 5
    store.finish("later", DONE)
    stores.clock.now += 5
    assert (store.get("ended"), store.image("ended", 0)) == (None, None), "before anything has removed it"
    store.expire()
    assert {job.id for job in store.list(None, 9)} == {"later", "running"}
    assert (store.counts.jobs, store.counts.expired, store.counts.evicted) == (2, 1, 0)


def test_those_that_ended_first_are_evicted(stores: Stores) -> None:
    store = stores(size=3 * OVERHEAD + 250)
    for name in ("a", "b", "c"):
        store.add(a_job(name), RECIPE)
    for name in ("b", "a"):
        store.finish(name, DONE, [bytes(100)])
        stores.clock.now += 1
    assert store.counts.jobs == 3
    store.finish("c", DONE, [bytes(100)])
    assert {job.id for job in store.list(None, 9)} == {"a", "c"}
    assert store.counts.evicted == 1


def test_a_result_larger_than_the_limit_can_still_be_fetched(stores: Stores) -> None:
    store = stores(size=100)
    store.add(a_job("large"), RECIPE)
    store.finish("large", DONE, [bytes(1000)])
    assert store.image("large", 0) == bytes(1000)


def test_jobs_that_have_not_ended_are_never_evicted(stores: Stores) -> None:
    store = stores(jobs=2)
    for name in "abcd":
        store.add(a_job(name), RECIPE)
    store.finish("b", DONE)
    store.finish("d", DONE)
    assert {job.id for job in store.list(None, 9)} == {"a", "c", "d"}


def test_the_latest_jobs_of_an_owner_are_listed_first(stores: Stores) -> None:
    store = stores()
    for name, owner in (("1", "amy"), ("2", "bob"), ("3", "amy"), ("4", None)):
        store.add(a_job(name, owner=owner), RECIPE)
    assert [job.id for job in store.list("amy", 9)] == ["3", "1"]
    assert [job.id for job in store.list(None, 3)] == ["4", "3", "2"]


def test_errors_are_restored() -> None:
    error = InvalidRequest("seed: no", fields=(FieldError("seed", "no"),))
    restored = StoredError.model_validate_json(StoredError.of(error).model_dump_json()).restore()
    assert (type(restored), restored.detail, restored.fields) == (InvalidRequest, error.detail, error.fields)
    assert type(StoredError(kind="OfTheFuture", detail="x").restore()).__name__ == "InternalError"
