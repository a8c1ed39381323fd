"""Two replicas on two nodes of a real cluster, through Ray Serve's proxies."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from benchmarks.cluster.ray_cluster import Cluster

_PROMPT = {"prompt": "a red heart", "seed": 7, "num_inference_steps": 4}
_LONG = {"prompt": "a red heart", "num_inference_steps": 100}
_PNG = {"Accept": "image/png"}
_EVENTS = {"Accept": "text/event-stream"}
Pixels = npt.NDArray[np.int16]


def pixels(png: bytes) -> Pixels:
    """An image's, [H, W, 3]."""
    return np.asarray(Image.open(BytesIO(png)), np.int16)


def test_each_of_two_nodes_has_a_replica_and_both_answer(cluster: Cluster) -> None:
    assert [len(node.replicas) for node in cluster.nodes] == [0, 1, 1]
    replicas: set[str] = set()
    images: list[Pixels] = []
    for _ in range(10):  # a replica may be chosen only once each ingress has heard of it
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(lambda _: cluster.client.post("/generate", json=_PROMPT, headers=_PNG), range(8))
            )
        assert {answer.status_code for answer in answers} == {200}
        images += [pixels(answer.content) for answer in answers]
        replicas |= {answer.headers["x-replica"] for answer in answers}
        if len(replicas) == 2:
            break
    assert len(replicas) == 2
    assert max(np.abs(image - images[0]).max() for image in images) <= 2  # of one seed, in batches of any size


def test_the_headers_of_an_image_are_those_of_the_server(cluster: Cluster) -> None:
    answer = cluster.client.post("/generate", json=_PROMPT, headers={**_PNG, "X-Request-Id": "mine"})
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "7"
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_events_arrive_as_they_happen(cluster: Cluster) -> None:
    """Once: on a busy machine, this caller may hear of them in lumps."""
    assert any(_are_spread(_times_of_events(cluster)) for _ in range(10))


def _times_of_events(cluster: Cluster) -> list[float]:
    began = time.monotonic()
    with cluster.client.stream("POST", "/generate", json=_LONG, headers=_EVENTS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        times = [time.monotonic() - began for line in answer.iter_lines() if line.startswith("event: ")]
    assert len(times) > 100
    return times


def _are_spread(times: Sequence[float]) -> bool:
    return times[0] < times[-1] / 2 and len({round(moment / times[-1], 1) for moment in times}) > 5


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/models", 200), ("/v1/models", 200), ("/v2/health/ready", 200), ("/nope", 404)]
)
def test_every_api_is_there(cluster: Cluster, path: str, status: int) -> None:
    assert cluster.client.get(path).status_code == status


def test_openai_clients_get_images_and_their_own_errors(cluster: Cluster) -> None:
    body = {"prompt": "a red heart", "n": 1}
    assert cluster.client.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    unknown = cluster.client.post("/v1/images/generations", json={**body, "model": "none"})
    assert unknown.json()["error"]["code"] == "model_not_found"


def test_jobs_are_refused_with_the_reason(cluster: Cluster) -> None:
    without_waiting = cluster.client.post("/generate?wait=false", json=_PROMPT)
    with_key = cluster.client.post("/generate", json=_PROMPT, headers={"Idempotency-Key": "k"})
    assert [without_waiting.status_code, with_key.status_code] == [422, 422]
    assert without_waiting.json()["errors"][0]["field"] == "wait"
    assert "no jobs on Ray Serve" in cluster.client.get("/jobs/0123").json()["detail"]


def test_a_body_that_is_too_large_is_refused_and_large_ones_arrive(cluster: Cluster) -> None:
    headers = {"Content-Type": "application/json"}
    too_large = cluster.client.post("/generate", content=b"x" * (35 * 2**20), headers=headers)
    assert too_large.status_code == 413
    body = b'{"prompt": "a", "image": "' + b"A" * (20 * 2**20) + b'"}'
    large = cluster.client.post("/generate", content=body, headers=headers)
    assert large.status_code == 422
    assert large.json()["errors"][0]["field"] == "image"


def test_metrics_are_those_of_all_replicas(cluster: Cluster) -> None:
    page = cluster.client.get("/metrics").text
    assert page.count("# TYPE latentd_ready gauge") == 1
    assert page.count("latentd_ready{replica=") == 2


def test_a_caller_that_leaves_ends_its_request(cluster: Cluster) -> None:
    with cluster.client.stream("POST", "/generate", json={**_LONG, "num_images": 4}, headers=_EVENTS) as answer:
        next(answer.iter_lines())
    assert _becomes(lambda: _total(cluster, "latentd_requests_total{", "cancelled"), at_least=1)


def test_a_model_is_unloaded_in_every_replica_and_loaded_by_the_next_request(cluster: Cluster) -> None:
    name = cluster.client.get("/models").json()[0]["name"]
    cluster.client.post(f"/v2/repository/models/{name}/unload").raise_for_status()
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: cluster.client.post("/generate", json=_PROMPT), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    cluster.client.post(f"/v2/repository/models/{name}/load").raise_for_status()


def test_a_replica_that_dies_costs_a_retry_and_ends_streams_with_an_error(cluster: Cluster) -> None:
    begun = threading.Barrier(7)
    with ThreadPoolExecutor(6) as threads:
        waiting = [threads.submit(_generate, cluster, begun, stream=index % 2 == 0) for index in range(6)]
        begun.wait()
        time.sleep(0.5)
        dying = next(node.replicas[0] for node in cluster.nodes if node.replicas)
        dying.kill()
        ends = [one.result() for one in waiting]
    assert set(ends) <= {"200", "retried", "completed", "error 503", "refused"}
    assert {"retried", "error 503"} & set(ends)
    cluster.wait_for_replicas(2)


def test_an_ingress_that_dies_is_answered_with_503_and_when_to_come_back(cluster: Cluster) -> None:
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(cluster.client.post, "/generate", json=_LONG) for _ in range(4)]
        time.sleep(0.5)
        for node in cluster.nodes:
            for ingress in node.ingresses:
                ingress.kill()
        answers = [one.result() for one in waiting]
    assert {answer.status_code for answer in answers} == {503}
    assert all("retry-after" in answer.headers and answer.json()["status"] == 503 for answer in answers)
    cluster.wait_for_replicas(2)


def _generate(cluster: Cluster, begun: threading.Barrier, *, stream: bool) -> str:
    """How a request of a second or more ends."""
    begun.wait()
    body = {"prompt": "a red heart", "num_inference_steps": 100}
    with httpx.Client(base_url=cluster.client.base_url, timeout=120, trust_env=False) as client:
        answer = client.post("/generate", json=body, headers=_EVENTS if stream else {})
    if answer.status_code == 503 and "retry-after" in answer.headers:
        return "refused"
    if not stream or answer.status_code != 200:
        return "retried" if "x-retried" in answer.headers else str(answer.status_code)
    last = answer.text.strip().split("\n\n")[-1]
    kind, _, data = last.partition("\n")
    return "error 503" if kind == "event: error" and '"status":503' in data else kind.removeprefix("event: ")


def _total(cluster: Cluster, *texts: str) -> float:
    lines = cluster.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(text in line for text in texts))


def _becomes(read: object, *, at_least: float, seconds: float = 30) -> bool:
    assert callable(read)
    until = time.monotonic() + seconds
    while read() < at_least:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
