"""What a job is run again from, should the process end before it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.api.native.job_runner import JobRunner
from server.jobs.job import Job, Recipe
from server.jobs.store import MemoryStore
from server.requests.context import ANONYMOUS
from server.requests.errors import QueueFull
from server.requests.schemas import GenerateRequest
from tests.support.batching import request


class Noted(MemoryStore):
    """A store that remembers what came."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes: list[Recipe] = []

    def add(self, job: Job, recipe: Recipe) -> None:
        self.recipes.append(recipe)
        super().add(job, recipe)


def test_its_seed_its_model_and_its_cache_are_those_that_the_server_chose() -> None:
    store, chosen = Noted(), request("a", cache="faster", model="demo")

    async def accept(*_: object, before_queued: Any, **__: object) -> None:
        await before_queued(chosen)
        raise QueueFull("There is no queue here.")

    async def create() -> None:
        runner = JobRunner(cast(Any, SimpleNamespace(jobs=store, accept=accept)))
        with pytest.raises(QueueFull):
            await runner.create(GenerateRequest(prompt="a"), ANONYMOUS, owner=None, key=None)
        await runner.calls.close()

    asyncio.run(create())
    (recipe,) = store.recipes
    assert (recipe.body.seed, recipe.body.model, recipe.body.cache) == (0, "demo", "faster")
