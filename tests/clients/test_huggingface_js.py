"""Hugging Face's JavaScript client."""

from __future__ import annotations

import base64

from tests.clients.load import Cancelling, FullQueue
from tests.clients.node import needs_node, run
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

pytestmark = needs_node
PNG = b"\x89PNG\r\n\x1a\n"


def test_picture(serving: Serving) -> None:
    got = run("huggingface.js", "picture", serving.url)
    native = serving.generate(prompt="a red heart", num_inference_steps=4, seed=7).json()["images"]
    assert got == {"type": "image/png", "image": native[0]["image"]}


def test_picture_without_parameters(serving: Serving) -> None:
    got = run("huggingface.js", "defaults", serving.url)
    assert base64.b64decode(got["image"]).startswith(PNG)


def test_image_to_image(serving: Serving) -> None:
    got = run("huggingface.js", "edit", serving.url)
    assert base64.b64decode(got["image"]).startswith(PNG)


def test_invalid_request(serving: Serving) -> None:
    got = run("huggingface.js", "invalid", serving.url)
    assert got["status"] == 422
    assert "num_inference_steps: Input should be" in got["message"]


def test_full_queue(full_queue: FullQueue) -> None:
    got = run("huggingface.js", "full", full_queue.serving.url)
    assert got["status"] == 429
    assert "waiting: try again later" in got["message"]


def test_aborting_cancels(serving: HeldServing) -> None:
    with Cancelling(serving):
        assert run("huggingface.js", "cancel", serving.url) == {"name": "AbortError"}
