"""Under load the dial is raised for requests that leave it to the server: the policy, and a server kept busy."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from engines.demo import BUNDLE as DEMO
from server.requests.depths import Cache
from server.requests.schemas import GenerateRequest
from server.runtime.degradation import Degradation, leaves_cache
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving, pictures, run_server

WARNING = "cache: The server was under load and set it to faster, not off, which changes images slightly: "
LONG = {
    "prompt": "a red heart",
    "num_inference_steps": 200,
    "num_images": 8,
    "cache": "off",
}  # all rows of the demo's engines
SHORT = {"prompt": "a red heart", "num_inference_steps": 5, "seed": 3}


@pytest.mark.parametrize(
    ("wait", "positions"),
    [
        (0.0, ("off", "fast", "faster")),
        (2.0, ("off", "fast", "faster")),
        (2.001, ("fast", "faster", "faster")),
        (4.0, ("fast", "faster", "faster")),
        (4.001, ("faster", "faster", "faster")),
        (1e9, ("faster", "faster", "faster")),
    ],
)
def test_the_expected_wait_alone_decides_the_position(wait: float, positions: tuple[Cache, ...]) -> None:
    policy = Degradation(at=2.0)
    caches: tuple[Cache, ...] = ("off", "fast", "faster")
    assert tuple(policy.position(cache, wait=wait) for cache in caches) == positions


@pytest.mark.parametrize(
    ("fields", "leaves"),
    [
        ({}, True),
        ({"cache": None, "guidance_scale": 3.0}, True),
        ({"exact": False}, True),
        ({"cache": "off"}, False),
        ({"cache": "fast"}, False),
        ({"exact": True}, False),
        ({"guidance_end": 0.8}, False),
        ({"guidance_end": "auto"}, False),
        ({"full_steps": 3}, False),
    ],
)
def test_who_sets_the_cache_or_a_part_of_it_keeps_it(fields: dict[str, Any], leaves: bool) -> None:
    assert leaves_cache(GenerateRequest.model_validate({"prompt": "a", **fields})) is leaves


@pytest.fixture(scope="module")
def touchy() -> Iterator[HeldServing]:
    """A server that degrades whatever has to wait at all."""
    with HeldServing(DEMO, "--degrade-at", "0.000001") as running:
        yield running


@contextmanager
def occupied(serving: HeldServing) -> Iterator[None]:
    """While a request takes all rows, of which only the first step is taken; it is cancelled at the end."""
    serving.wait_for(0)
    with serving.held():
        path = serving.client.post("/generate?wait=false", json=LONG).headers["Location"]
        serving.let(1)
        wait_until(lambda: serving.client.get(path).json()["status"] == "running")
        yield
        assert serving.client.delete(path).status_code == 202


def degraded(serving: Serving) -> dict[str, float]:
    return {cache: serving.total("latentd_requests_degraded_total", cache=cache) for cache in ("fast", "faster")}


def accepted_by(serving: Serving, **fields: Any) -> dict[str, Any]:
    """The job of a request, as it is when it is accepted."""
    answer = serving.client.post("/generate?wait=false", json={**SHORT, **fields})
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_server_without_load_degrades_nothing(touchy: HeldServing) -> None:
    before = degraded(touchy)
    found = touchy.generate(**SHORT).json()
    assert (found["parameters"]["cache"], found["warnings"]) == ("off", [])
    assert degraded(touchy) == before


def test_a_busy_server_leaves_the_others_alone(touchy: HeldServing) -> None:
    before = degraded(touchy)
    choices = ({"cache": "off"}, {"cache": "fast"}, {"exact": True}, {"guidance_end": 0.8}, {"full_steps": 3})
    others = (*choices, {"num_inference_steps": 4})  # of so few none reuses anything
    with occupied(touchy):
        found = [accepted_by(touchy, **fields) for fields in others]
    assert [one["parameters"]["cache"] for one in found] == ["off", "fast", "off", "off", "off", "off"]
    assert [one["warnings"] for one in found] == [[]] * 6
    assert degraded(touchy) == before


def test_every_api_degrades_and_says_so_and_images_are_those_of_the_position(touchy: HeldServing) -> None:
    """Sent while a request takes all rows: a job, a request as JSON, one as a file, and over the other APIs."""
    before, post = degraded(touchy), touchy.client.post
    with ThreadPoolExecutor(4) as pool, occupied(touchy):
        job = accepted_by(touchy)
        ours = pool.submit(post, "/generate", json=SHORT)
        file = pool.submit(post, "/generate", json=SHORT, headers={"Accept": "image/png"})
        openai = pool.submit(post, "/v1/images/generations", json={**SHORT, "response_format": "b64_json"})
        webui = pool.submit(post, "/sdapi/v1/txt2img", json={"prompt": "a red heart", "steps": 5, "seed": 3})
        wait_until(lambda: degraded(touchy)["faster"] == before["faster"] + 5)
    answers = [one.result() for one in (ours, file, openai, webui)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert degraded(touchy) == {"fast": before["fast"], "faster": before["faster"] + 5}
    native = answers[0].json()
    for document in (job, native):
        assert (document["parameters"]["cache"], document["parameters"]["guidance_end"]) == ("faster", "auto")
        assert [warning.startswith(WARNING) for warning in document["warnings"]] == [True]
    assert all("under load" in answer.headers["X-Warnings"] for answer in answers[1:3])
    assert "under load" in answers[3].json()["info"]
    files = [
        base64.b64decode(text) for text in (answers[2].json()["data"][0]["b64_json"], answers[3].json()["images"][0])
    ]
    assert all(b"Cache: faster" in content for content in (answers[1].content, *files))
    degraded_picture, faster, off = (
        pictures(answer)[0]
        for answer in (answers[0], *(touchy.generate(**SHORT, cache=cache) for cache in ("faster", "off")))
    )
    rounding, change = (np.abs(degraded_picture - other).mean() for other in (faster, off))
    assert rounding < change / 4, "batching may change the last bits"


def test_it_needs_the_step_cache() -> None:
    ended = run_server("--port", "0", "--degrade-at", "1", "--cache", "disabled")
    assert ended.returncode != 0
    assert "--degrade-at raises the step cache, which --cache disabled leaves out" in ended.stderr
