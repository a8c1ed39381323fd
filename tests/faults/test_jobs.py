"""Jobs of servers that end: by a signal, in the middle of a job, with a full disk; and two servers on one file."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engines.demo import BUNDLE as DEMO
from tests.faults.test_full_disk import disk, fill
from tests.support.jobs import post_job, wait_for_job
from tests.support.serving import Serving, run_server

SHORT: dict[str, Any] = {"prompt": "a red heart on a yellow background", "num_inference_steps": 3, "seed": 5}
LONG: dict[str, Any] = {
    "prompt": "a penguin on a blue background",
    "num_inference_steps": 150,
    "scheduler": "ddim",
    "exact": True,
}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


def serve(database: Path, *arguments: str) -> Serving:
    return Serving(DEMO, "--jobs-database", str(database), *arguments)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_outlive_a_server(database: Path, how: signal.Signals) -> None:
    """Those that have ended are there, the others are run with the seeds that were drawn, in their order."""
    with serve(database, "--drain-seconds", "0") as first:
        ended = post_job(first, **SHORT)
        done = wait_for_job(first, ended)
        image = first.client.get(f"{ended}/image").content
        paths = [post_job(first, **LONG), *(post_job(first, **SHORT, exact=True) for _ in range(2))]
        running = wait_for_job(first, paths[0], lambda job: job["step"] > 2)
        late = post_job(first, **LONG, timeout_s=5)
        first.client.close()
        first.stop(how=how)
    with serve(database) as second:
        found = second.client.get(ended).json()
        assert found == done
        assert second.client.get(f"{ended}/image").content == image
        assert second.client.get(paths[0]).json()["status"] in ("queued", "running"), "it was not interrupted"
        again = [wait_for_job(second, path) for path in paths]
        assert [job["status"] for job in again] == ["completed"] * 3
        assert [job["started"] for job in again] == sorted(job["started"] for job in again)
        assert again[0]["parameters"] == running["parameters"]
        expected = second.client.post("/generate", json=again[0]["parameters"], headers={"Accept": "image/png"})
        assert second.client.get(f"{paths[0]}/image").content == expected.content
        ended_late = wait_for_job(second, late)
        assert (ended_late["status"], ended_late["error"]["status"]) == ("failed", 504)


TWIN = "--bundle", f"twin={DEMO}"


@pytest.mark.parametrize(
    ("options", "status", "error"),
    [(TWIN, "completed", None), ((*TWIN, "--load", "latentd-demo"), "failed", 503), ((), "failed", 404)],
    ids=["loaded", "not loaded", "gone"],
)
def test_a_job_is_run_again_by_its_model(
    database: Path, options: tuple[str, ...], status: str, error: int | None
) -> None:
    with serve(database, *TWIN) as first:
        job = post_job(first, **LONG, model="twin")
        wait_for_job(first, job, lambda now: now["step"] > 2)
        first.client.close()
        first.stop(how=signal.SIGKILL)
    with serve(database, *options) as second:
        found = wait_for_job(second, job)
        assert (found["status"], found["model"]) == (status, "twin")
        assert (found["error"] and found["error"]["status"]) == error
        if error:
            assert "twin" in found["error"]["detail"]
        else:
            assert b"Model: twin" in second.client.get(f"{job}/image").content


def test_a_running_job_is_stored_within_the_drain(database: Path) -> None:
    with serve(database, "--drain-seconds", "60") as first:
        rows = first.client.get("/models").json()[0]["max_rows"]
        full = {**LONG, "exact": False, "num_inference_steps": 40, "num_images": rows // 2}
        running = post_job(first, **full)
        wait_for_job(first, running, lambda job: job["step"])
        waiting = post_job(first, **full)
        first.client.close()
        assert first.stop() == 0
    with serve(database) as second:
        assert second.client.get(running).json()["status"] == "completed"
        assert second.client.get(waiting).json()["status"] in ("queued", "running")


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "database"])
def test_those_who_wait_for_a_job_are_answered_when_the_server_stops(database: Path, stored: bool) -> None:
    """In memory and in time with the image, else with an error that lets them ask the next server."""
    options = ["--jobs-database", str(database), "--drain-seconds", "0"] if stored else []
    with Serving(DEMO, *options) as first, ThreadPoolExecutor(1) as pool:
        key = {"Idempotency-Key": "1"}
        job = first.client.post("/generate?wait=false", json=LONG, headers=key).headers["Location"]
        waiting = pool.submit(first.client.post, "/generate", json=LONG, headers=key)
        wait_for_job(first, job, lambda document: document["step"] > 2)
        assert first.stop() == 0
        answer = waiting.result()
        assert answer.status_code == (503 if stored else 200)
        assert not stored or answer.json()["title"] == "Server stopping"


def test_jobs_in_memory_end_with_the_server(tmp_path: Path) -> None:
    del tmp_path
    with Serving(DEMO) as first:
        path = post_job(first, **LONG)
        wait_for_job(first, path, lambda job: job["step"])
        first.client.close()
        assert first.stop(seconds=20) == 0, "a job that nobody can ask about delays the stop"
        assert not [line for line in first.stderr if "Traceback" in line]
    with Serving(DEMO) as second:
        answer = second.client.get(path)
        assert answer.status_code == 404
        assert "all of them when the server stops" in answer.json()["detail"]


def test_the_same_key_finds_its_job_after_a_restart(database: Path) -> None:
    key = {"Idempotency-Key": "6b0f5f0e"}
    with serve(database, "--drain-seconds", "0") as first:
        accepted = first.client.post("/generate?wait=false", json=LONG, headers=key).json()
        wait_for_job(first, f"/jobs/{accepted['id']}", lambda job: job["step"])
        first.client.close()
        first.stop(how=signal.SIGKILL)
    with serve(database) as second:
        answer = second.client.post("/generate", json=LONG, headers=key)
        assert answer.status_code == 200, answer.text
        assert answer.json()["id"] == accepted["id"]
        assert answer.json()["parameters"] == accepted["parameters"], "its seed among them"


def test_a_job_that_ends_the_server_each_time_is_given_up(database: Path) -> None:
    path = ""
    for _ in range(3):
        with serve(database) as server:
            path = path or post_job(server, **LONG)
            wait_for_job(server, path, lambda job: job["step"] > 1)
            server.client.close()
            server.stop(how=signal.SIGKILL)
    with serve(database) as server:
        ended = wait_for_job(server, path)
        assert (ended["status"], ended["error"]["status"]) == ("failed", 500)
        assert "ended 3 times" in ended["error"]["detail"]


def test_a_job_that_has_not_begun_again_can_be_cancelled(database: Path) -> None:
    with serve(database) as first:
        paths = [post_job(first, **LONG) for _ in range(2)]
        wait_for_job(first, paths[0], lambda job: job["step"])
        first.client.close()
        first.stop(how=signal.SIGKILL)
    with serve(database) as second:
        for path in reversed(paths):
            assert second.client.delete(path).status_code in (202, 204)
            assert wait_for_job(second, path)["status"] == "cancelled"


def test_two_servers_do_not_share_a_file(database: Path) -> None:
    with serve(database) as first:
        ended = run_server("--bundle", str(DEMO), "--port", "0", "--jobs-database", str(database))
        assert ended.returncode == 1
        assert "is in use by another process" in ended.stderr.splitlines()[-1]
        wait_for_job(first, post_job(first, **SHORT))


def test_a_damaged_file_is_an_error_of_one_line(database: Path) -> None:
    database.write_bytes(b"no database" * 1000)
    ended = run_server("--bundle", str(DEMO), "--port", "0", "--jobs-database", str(database))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "is damaged" in ended.stderr.splitlines()[-1]


def test_a_full_disk_refuses_jobs_and_loses_none(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 4 << 20) as folder:
        database = folder / "jobs.db"
        with serve(database) as server:
            before = post_job(server, **SHORT)
            wait_for_job(server, before)
            running = post_job(server, **LONG)
            wait_for_job(server, running, lambda job: job["step"])
            fill(folder, but=0)
            refused = server.client.post("/generate?wait=false", json=SHORT)
            assert (refused.status_code, refused.json()["title"]) == (503, "Storage failed"), refused.text
            assert server.generate(**SHORT).status_code == 200, "requests that are no jobs need no disk"
            assert wait_for_job(server, running)["status"] == "completed"
            assert server.client.get(f"{running}/image").status_code == 200, "the image is kept in memory meanwhile"
            (folder / "filler").unlink()
            after = post_job(server, **SHORT)
            wait_for_job(server, after)
            server.client.close()
            server.stop()
        with serve(database) as server:
            for path in (before, running, after):
                assert wait_for_job(server, path)["status"] == "completed"
                assert server.client.get(f"{path}/image").status_code == 200
