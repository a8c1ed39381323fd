"""Jobs in memory: their state, images and events, who sees them, and how they end."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import PIL.Image
import pytest

from engines.demo import BUNDLE as DEMO
from server.api.native.jobs import Jobs, Viewer, as_job
from server.api.service import Service
from server.jobs.store import MemoryStore
from server.requests.errors import Forbidden, NotFound
from server.requests.image_files import ImageFiles
from tests.support.bare_server import wait_until
from tests.support.jobs import RECIPE, a_job, post_job, wait_for_job
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

SHORT: dict[str, Any] = {"prompt": "a red heart on a yellow background", "num_inference_steps": 2, "seed": 5}
LONG: dict[str, Any] = {
    "prompt": "a penguin on a blue background",
    "num_inference_steps": 200,
    "scheduler": "ddim",
    "seed": 1,
}


def steps_run(serving: Serving) -> float:
    return serving.metrics()["latentd_steps_total"]


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.splitlines() for block in answer.text.split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_job_is_accepted_runs_and_has_the_images_of_a_request(demo: Serving) -> None:
    answer = demo.client.post("/generate?wait=false", json={**SHORT, "num_images": 2, "priority": "batch"})
    accepted = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/jobs/{accepted['id']}"
    assert (accepted["steps"], accepted["priority"]) == (2, "batch")
    done = wait_for_job(demo, answer.headers["Location"])
    assert (done["status"], done["step"], done["error"], done["position"]) == ("completed", 2, None, None)
    assert done["created"] <= done["started"] <= done["finished"] < done["expires"]
    assert done["timings"]["denoise"] > 0
    expected = demo.generate(**SHORT, num_images=2).json()
    assert done["parameters"] == expected["parameters"]
    assert [image["seed"] for image in done["images"]] == [5, 6]
    for image in done["images"]:
        file = demo.client.get(image["url"])
        alone = demo.client.post("/generate", json={**SHORT, "seed": image["seed"]}, headers={"Accept": "image/png"})
        assert pixels(file) == pixels(alone)
    for kind in ("png", "jpeg", "webp"):
        file = demo.client.get(f"{answer.headers['Location']}/image", headers={"Accept": f"image/{kind}"})
        assert (file.headers["Content-Type"], file.headers["X-Seed"]) == (f"image/{kind}", "5")
        direct = demo.client.post("/generate", json=SHORT, headers={"Accept": f"image/{kind}"})
        assert (
            PIL.Image.open(io.BytesIO(file.content)).info.keys()
            == PIL.Image.open(io.BytesIO(direct.content)).info.keys()
        )
    assert demo.client.get(f"{answer.headers['Location']}/images/2").status_code == 404
    refused = demo.client.get(f"{answer.headers['Location']}/image", headers={"Accept": "application/json"})
    assert refused.status_code == 406


def pixels(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return PIL.Image.open(io.BytesIO(answer.content)).tobytes()


def test_a_running_job_tells_its_step_and_is_cancelled_at_the_next(demo: HeldServing) -> None:
    with demo.held():
        path = post_job(demo, **LONG)
        demo.let(9)
        running = wait_for_job(demo, path, lambda job: job["step"] > 1)
        assert running["status"] == "running"
        early = demo.client.get(f"{path}/image")
        assert (early.status_code, early.json()["title"]) == (409, "Not done")
        assert demo.client.delete(path).status_code == 202
    ended = wait_for_job(demo, path)
    assert (ended["status"], ended["error"]["title"]) == ("cancelled", "Cancelled")
    assert ended["step"] < 200
    assert demo.client.get(f"{path}/image").status_code == 409
    assert demo.client.delete(path).status_code == 204
    gone = demo.client.get(path)
    assert gone.status_code == 404
    assert "all of them when the server stops" in gone.json()["detail"]


def test_a_waiting_job_has_a_position_and_a_full_queue_refuses(demo: HeldServing) -> None:
    rows = demo.client.get("/models").json()[0]["max_rows"]
    full = {**LONG, "num_images": rows // 2}
    with demo.held():
        paths = [post_job(demo, **full)]
        demo.let(9)
        wait_for_job(demo, paths[0], lambda job: job["step"])
        paths += [post_job(demo, **full) for _ in range(2)]
        assert wait_for_job(demo, paths[2], lambda job: job["position"] is not None)["position"] >= 1
        refusals = [demo.client.post("/generate?wait=false", json=full) for _ in range(4)]
        paths += [answer.headers["Location"] for answer in refusals if answer.status_code == 202]
        assert refusals[-1].status_code == 429
        assert int(refusals[-1].headers["Retry-After"]) >= 1
        stored = demo.metrics()["latentd_jobs"]
        for path in reversed(paths):
            demo.client.delete(path)
    assert {wait_for_job(demo, path)["status"] for path in paths} == {"cancelled"}
    assert demo.metrics()["latentd_jobs"] == stored, "a refused job was stored"


def test_events_join_a_job_where_it_is(demo: HeldServing) -> None:
    with demo.held():
        path = post_job(demo, **{**LONG, "num_inference_steps": 60})
        demo.let(9)
        wait_for_job(demo, path, lambda job: job["step"] > 3)
        with demo.client.stream("GET", f"{path}/events") as answer:
            demo.let(100)
            answer.read()
    heard = events(answer)
    assert heard[0][0] == "step"
    steps = [document["step"] for name, document in heard if name == "step"]
    assert steps == list(range(steps[0], 61))
    assert heard[-1][0] == "completed"
    again = events(demo.client.get(f"{path}/events"))
    assert again == heard[-1:]


def test_the_same_key_is_the_same_job(demo: Serving) -> None:
    key = {"Idempotency-Key": "key-1"}
    before = demo.metrics()["latentd_images_total"]
    first = demo.client.post("/generate", json={"prompt": "a cat", "num_inference_steps": 2}, headers=key)
    again = demo.client.post("/generate", json={"num_inference_steps": 2, "prompt": "a cat"}, headers=key)
    assert first.status_code == 200
    assert again.json() == first.json(), "a seed was drawn twice"
    as_job = demo.client.post("/generate?wait=false", json={"prompt": "a cat", "num_inference_steps": 2}, headers=key)
    assert as_job.json()["id"] == first.headers["X-Job-Id"] == first.json()["id"]
    file = demo.client.post(
        "/generate", json={"prompt": "a cat", "num_inference_steps": 2}, headers={**key, "Accept": "image/png"}
    )
    assert file.headers["X-Seed"] == str(first.json()["images"][0]["seed"])
    other = demo.client.post("/generate", json={"prompt": "a dog", "num_inference_steps": 2}, headers=key)
    assert other.status_code == 422
    assert other.json()["errors"][0]["field"] == "Idempotency-Key"
    assert demo.metrics()["latentd_images_total"] == before + 1


def test_a_lost_connection_loses_no_image(demo: HeldServing) -> None:
    """The caller hangs up while its request runs, and asks again: it waits for the same run."""
    key = {"Idempotency-Key": "key-2"}
    body = {**LONG, "num_inference_steps": 40}
    before = steps_run(demo)
    accept = {"Accept": "text/event-stream"}
    with demo.held(), demo.client.stream("POST", "/generate", json=body, headers={**key, **accept}) as answer:
        demo.let(9)
        job = answer.headers["X-Job-Id"]
        assert any("event: step" in text for text in answer.iter_text())
    again = demo.client.post("/generate", json=body, headers=key)
    assert (again.status_code, again.headers["X-Job-Id"]) == (200, job)
    assert steps_run(demo) == before + 40


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, '"unclosed'])
def test_a_key_that_is_none_is_refused(demo: Serving, key: str) -> None:
    answer = demo.client.post("/generate", json=SHORT, headers=[(b"Idempotency-Key", key.encode())])
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"


def test_wait_is_true_or_false(demo: Serving) -> None:
    answer = demo.client.post("/generate?wait=maybe", json=SHORT)
    assert (answer.status_code, answer.json()["detail"]) == (422, "wait: it is true or false.")
    assert demo.client.post("/generate?wait=true", json=SHORT).status_code == 200


@pytest.mark.parametrize("how", ["field", "header"])
def test_what_expires_in_the_queue_takes_no_step(demo: Serving, how: str) -> None:
    rows = demo.client.get("/models").json()[0]["max_rows"]
    full = {**LONG, "num_images": rows // 2}
    running = post_job(demo, **full)
    wait_for_job(demo, running, lambda job: job["step"])
    limit = {"timeout_s": 0.05} if how == "field" else {}
    headers = {"X-Request-Timeout": "0.05"} if how == "header" else {}
    waiting = post_job(demo, **full, **limit, timeout=headers.get("X-Request-Timeout"))
    answer = demo.client.post("/generate", json={**full, **limit}, headers=headers)
    assert (answer.status_code, answer.json()["title"]) == (504, "Deadline exceeded")
    ended = wait_for_job(demo, waiting)
    assert (ended["status"], ended["step"], ended["started"]) == ("failed", 0, None)
    assert ended["error"]["status"] == 504
    assert demo.client.get(f"{waiting}/image").status_code == 504
    demo.client.delete(running)
    wait_for_job(demo, running)


def test_what_expires_while_it_runs_ends_at_the_next_step(demo: Serving) -> None:
    before = cancelled(demo)
    headers = {"Accept": "text/event-stream"}
    heard = events(demo.client.post("/generate", json={**LONG, "timeout_s": 0.5}, headers=headers))
    name, problem = heard[-1]
    assert (name, problem["status"], problem["title"]) == ("error", 504, "Deadline exceeded")
    steps: list[int] = []
    while not any(steps):  # a busy machine may not get to its first step in time
        job = wait_for_job(demo, post_job(demo, **LONG, timeout=str(0.5 * 4 ** len(steps))))
        assert (job["status"], job["error"]["status"]) == ("failed", 504)
        steps.append(job["step"])
    assert steps[-1] < 200
    assert cancelled(demo) == before + 1 + len(steps)


def test_a_time_limit_begins_when_the_headers_arrive(demo: Serving) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"prompt":'
        time.sleep(1)  # twice as long as the image may take
        yield b' "a red heart", "num_inference_steps": 1}'

    before = steps_run(demo)
    headers = {"Content-Type": "application/json", "X-Request-Timeout": "0.5"}
    assert demo.client.post("/generate", content=slowly(), headers=headers).status_code == 504
    assert steps_run(demo) == before


def cancelled(serving: Serving) -> float:
    """Requests that were cancelled, of every API."""
    return serving.total("latentd_requests_total", outcome="cancelled")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "1e9"])
def test_a_timeout_that_is_none_is_refused(demo: Serving, value: str) -> None:
    answer = demo.client.post("/generate", json=SHORT, headers={"X-Request-Timeout": value})
    assert answer.status_code == 422
    assert "X-Request-Timeout" in answer.json()["detail"]


def test_there_is_no_list_without_a_key(demo: Serving) -> None:
    assert demo.client.get("/jobs").status_code == 403
    assert demo.client.get("/jobs/no-such").status_code == 404


def test_jobs_expire() -> None:
    with Serving(DEMO, "--job-ttl", "1") as serving:
        path = post_job(serving, **SHORT)
        wait_for_job(serving, path)
        wait_until(lambda: serving.metrics()["latentd_jobs_expired_total"] == 1)
        assert serving.client.get(path).status_code == 404
        assert serving.metrics()["latentd_jobs"] == 0


AMY, BOB, ADMIN, NOBODY = Viewer("amy"), Viewer("bob"), Viewer("root", is_admin=True), Viewer(None)


@pytest.mark.parametrize(
    ("viewer", "owner", "sees"),
    [
        (AMY, "amy", True),
        (BOB, "amy", False),
        (NOBODY, "amy", False),
        (ADMIN, "amy", True),
        (BOB, None, True),
        (NOBODY, None, True),
    ],
)
def test_a_job_is_for_its_owner(viewer: Viewer, owner: str | None, sees: bool) -> None:
    async def found() -> bool:
        jobs = stored("one", owner)
        try:
            return as_job(await jobs.get("one", viewer)).id == "one"
        except NotFound:
            return False

    assert asyncio.run(found()) == sees


def test_a_list_has_the_jobs_of_its_viewer() -> None:
    async def listed(viewer: Viewer) -> list[str]:
        return [as_job(job).id for job in await stored("one", "amy").latest(viewer)]

    assert asyncio.run(listed(AMY)) == asyncio.run(listed(ADMIN)) == ["one"]
    assert asyncio.run(listed(BOB)) == []
    with pytest.raises(Forbidden):
        asyncio.run(listed(NOBODY))


def stored(name: str, owner: str | None) -> Jobs:
    store = MemoryStore()
    store.add(a_job(name, owner=owner), RECIPE)
    parts = SimpleNamespace(jobs=store, runtime=SimpleNamespace(batcher=None), image_files=ImageFiles())
    return Jobs(cast(Service, parts))
