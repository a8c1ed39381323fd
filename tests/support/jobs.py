"""Jobs that no server has run, and jobs of a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx

from server.jobs.job import Facts, Job, Key, Recipe
from server.requests.schemas import GenerateRequest, Parameters, Timings
from tests.support.serving import Serving

PARAMETERS = Parameters(
    prompt="a red heart",
    negative_prompt="",
    prompt_syntax="a1111",
    clip_skip=0,
    width=64,
    height=64,
    num_inference_steps=2,
    guidance_scale=4.0,
    guidance_start=0.0,
    guidance_end=1.0,
    seed=7,
    num_images=1,
    scheduler="ddim",
    timestep_spacing=None,
    final_sigmas_type=None,
    eta=None,
    strength=None,
    exact=False,
    cache="off",
)
TIMINGS = Timings(queue=0.1, encode=0.1, denoise=0.1, decode=0.1, image=0.1, total=0.5)
FACTS = Facts(
    model="demo",
    parameters=PARAMETERS,
    warnings=[],
    steps=2,
    image_format="png",
    priority="batch",
    request_id="request-1",
    created=datetime(2026, 1, 1, tzinfo=UTC),
)
DONE = FACTS.completed(TIMINGS, None, flagged=(True,))
RECIPE = Recipe(GenerateRequest(prompt="a red heart", seed=7, image=b"\x00\xffpng"), "192.0.2.1", "jobs")


def a_job(name: str, *, owner: str | None = None, key: str | None = None) -> Job:
    return Job(name, owner, FACTS, Key("192.0.2.1", key, "f") if key else None)


def post_job(serving: Serving, *, timeout: str | None = None, **fields: Any) -> str:
    """The path of a job that was accepted."""
    headers = {"X-Request-Timeout": timeout} if timeout else {}
    answer = serving.client.post("/generate?wait=false", json=fields, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.json()["id"] in answer.headers["Location"]
    return answer.headers["Location"]


def wait_for_job(
    serving: Serving, path: str, condition: Callable[[dict[str, Any]], object] = lambda job: job["finished"]
) -> dict[str, Any]:
    """The document of a job once it fulfils `condition`: at first when it has ended."""
    deadline = time.monotonic() + 90
    while True:
        answer: httpx.Response = serving.client.get(path)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        if condition(document):
            return document
        assert time.monotonic() < deadline, document
        time.sleep(0.05)
