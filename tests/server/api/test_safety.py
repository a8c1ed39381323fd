"""A real server over a bundle with a safety checker: verdicts as in diffusers, flagged images sent or blocked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.demo import BUNDLE as DEMO
from engines.manifest import Manifest
from tests.support.jobs import post_job, wait_for_job
from tests.support.safety import REQUEST, SEEDS, checking_pipeline, draw
from tests.support.serving import Serving, run_server

CHECKS = "tests.support.prompt_checks:refuse_boats"


@pytest.fixture(scope="module")
def expected(checked_checkpoint: Path) -> list[bool]:
    """What diffusers says of the picture of each seed."""
    pipeline = checking_pipeline(checked_checkpoint)
    return [draw(pipeline, seed).nsfw_content_detected[0] for seed in SEEDS]


@pytest.fixture(scope="module")
def flagging(checked_bundle: Path) -> Iterator[Serving]:
    """As it is by default; two images are decoded at once."""
    with Serving(checked_bundle, "--decode-chunk", "2") as running:
        yield running


@pytest.fixture(scope="module")
def blocking(checked_bundle: Path) -> Iterator[Serving]:
    with Serving(checked_bundle, "--safety", "block", "--prompt-check", CHECKS) as running:
        yield running


def flags(answer: httpx.Response) -> list[bool | None]:
    assert answer.status_code == 200, answer.text
    return [image["nsfw_content_detected"] for image in answer.json()["images"]]


def events(serving: Serving, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    return read_events(serving.client.post("/generate", json=fields, headers={"Accept": "text/event-stream"}).text)


def read_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    frames = [dict(line.split(": ", 1) for line in frame.splitlines()) for frame in text.strip().split("\n\n")]
    return [(frame["event"], json.loads(frame["data"])) for frame in frames if "event" in frame]


def test_verdicts_are_those_of_diffusers(flagging: Serving, expected: list[bool]) -> None:
    assert len(set(expected)) == 2
    before = flagging.metrics().get("latentd_images_flagged_total", 0)
    assert flags(flagging.generate(**REQUEST, seed=0, num_images=7)) == expected[:7]
    assert flagging.metrics()["latentd_images_flagged_total"] - before == sum(expected[:7])


@pytest.mark.parametrize("flagged", [True, False])
def test_a_bare_image_says_it_in_a_header_and_a_stream_in_its_last_event(
    flagging: Serving, expected: list[bool], flagged: bool
) -> None:
    seed = expected.index(flagged)
    bare = flagging.client.post("/generate", json={**REQUEST, "seed": seed}, headers={"Accept": "image/png"})
    assert bare.headers["X-NSFW-Content-Detected"] == json.dumps(flagged)
    name, completed = events(flagging, **REQUEST, seed=seed)[-1]
    assert (name, completed["images"][0]["nsfw_content_detected"]) == ("completed", flagged)


def test_a_job_keeps_the_verdict_of_each_image(flagging: Serving, expected: list[bool]) -> None:
    path = post_job(flagging, **REQUEST, seed=0, num_images=7)
    done = wait_for_job(flagging, path)
    files = [flagging.client.get(image["url"]) for image in done["images"]]
    assert [json.loads(file.headers["X-NSFW-Content-Detected"]) for file in files] == expected[:7]
    name, completed = read_events(flagging.client.get(f"{path}/events").text)[-1]
    assert name == "completed"
    assert [image["nsfw_content_detected"] for image in completed["images"]] == expected[:7]


def test_a_job_with_a_flagged_image_is_blocked(blocking: Serving, expected: list[bool]) -> None:
    path = post_job(blocking, **REQUEST, seed=expected.index(True))
    ended = wait_for_job(blocking, path)
    assert (ended["status"], ended["images"]) == ("failed", [])
    assert (ended["error"]["status"], ended["error"]["title"]) == (422, "Content blocked")
    assert blocking.client.get(f"{path}/image").status_code == 422


def test_a_request_with_a_flagged_image_is_blocked_and_names_its_seeds(blocking: Serving, expected: list[bool]) -> None:
    before = blocking.metrics()
    answer = blocking.generate(**REQUEST, seed=0, num_images=7)
    seeds = [seed for seed in range(7) if expected[seed]]
    assert (answer.status_code, answer.json()["title"]) == (422, "Content blocked")
    assert f"the image of seeds {', '.join(map(str, seeds))}: use another seed" in answer.json()["detail"]
    after = blocking.metrics()
    assert after["latentd_images_flagged_total"] - before["latentd_images_flagged_total"] == len(seeds)
    assert _blocked(after) - _blocked(before) == 1
    assert flags(blocking.generate(**REQUEST, seed=expected.index(False))) == [False]
    assert blocking.client.get("/v2/health/ready").status_code == 200


def _blocked(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if 'outcome="blocked"' in name)


@pytest.mark.parametrize("flagged", [True, False])
def test_where_images_are_blocked_previews_show_nothing_either(
    blocking: Serving, expected: list[bool], flagged: bool
) -> None:
    sent = events(blocking, **REQUEST, seed=expected.index(flagged), preview_every=1)
    steps = [data for name, data in sent if name == "step"]
    assert steps
    assert not any(step["preview"] or step["previews"] for step in steps)
    name, last = sent[-1]
    assert name == ("error" if flagged else "completed")
    assert "images" not in last or not flagged


def test_openai_clients_read_of_it_in_their_own_words(blocking: Serving, expected: list[bool]) -> None:
    body = {"prompt": REQUEST["prompt"], "num_inference_steps": 2, "seed": expected.index(True), "size": "32x32"}
    answer = blocking.client.post("/v1/images/generations", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked"), answer.text
    answer = blocking.client.post("/v1/images/generations", json={**body, "prompt": "two old boats"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "moderation_blocked"), answer.text


def test_a_prompt_is_refused_with_the_reason(blocking: Serving) -> None:
    answer = blocking.generate(prompt="two old boats at night")
    assert (answer.status_code, answer.json()["detail"]) == (422, "no pictures of boats here")
    assert answer.json()["errors"] == [{"field": "prompt", "message": "no pictures of boats here"}]
    assert blocking.metrics()['latentd_requests_rejected_total{reason="PromptRefused"}'] >= 1


def test_a_check_that_fails_lets_nothing_through_and_logs_no_prompt(blocking: Serving) -> None:
    answer = blocking.generate(prompt="a bird", negative_prompt="a secret")
    assert (answer.status_code, answer.json()["detail"]) == (
        500,
        "The prompt could not be checked; see the server log.",
    )
    assert blocking.logged("prompt_checks:refuse_boats raised ValueError")
    assert "a secret" not in "".join(blocking.stderr)


def test_without_the_check_images_are_neither_checked_nor_blocked(checked_bundle: Path, expected: list[bool]) -> None:
    with Serving(checked_bundle, "--safety", "off") as running:
        assert flags(running.generate(**REQUEST, seed=expected.index(True))) == [None]


def test_a_damaged_checker_is_refused(checked_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(checked_bundle, tmp_path / "bundle"))
    (file, *_) = Manifest.read(bundle).graphs["safety"].onnx["fp32"].files
    content = bytearray((bundle / file.path).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file.path).write_bytes(content)
    ended = run_server("--bundle", str(bundle), "--port", "0")
    assert ended.returncode == 1
    assert file.path in ended.stderr


def test_a_bundle_without_a_checker_is_checked_by_the_extra() -> None:
    with Serving(DEMO, "--safety", "flag") as running:
        answer = running.generate(prompt="a red heart", num_inference_steps=2, num_images=2, seed=1)
        assert flags(answer) == [False, False]


def test_the_demo_is_served_as_before() -> None:
    manifest = Manifest.read(DEMO)
    assert not manifest.has_safety_checker
    assert manifest.model_dump_json(indent=2) + "\n" == (DEMO / "manifest.json").read_text()


def test_what_was_not_checked_says_so(serving: Serving) -> None:
    assert flags(serving.generate(prompt="a red cat", num_inference_steps=1)) == [None]
    bare = serving.client.post(
        "/generate", json={"prompt": "", "num_inference_steps": 1}, headers={"Accept": "image/png"}
    )
    assert bare.status_code == 200
    assert "X-NSFW-Content-Detected" not in bare.headers
