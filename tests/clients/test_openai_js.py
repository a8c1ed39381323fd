"""OpenAI's JavaScript client."""

from __future__ import annotations

import base64

from tests.clients.load import Cancelling, FullQueue
from tests.clients.node import needs_node, run
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

pytestmark = needs_node
PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures(serving: Serving) -> None:
    got = run("openai.js", "picture", serving.url)
    native = serving.generate(prompt="a red heart", num_images=2, num_inference_steps=4, seed=7).json()["images"]
    assert got["images"] == [image["image"] for image in native]
    assert got["urls"] == [f"data:image/png;base64,{image}" for image in got["images"]]
    assert got["size"] == "64x64"


def test_stream_of_partial_images(serving: Serving) -> None:
    *partial, completed = run("openai.js", "stream", serving.url)["events"]
    assert partial == [["image_generation.partial_image", index] for index in range(2)]
    assert completed == ["image_generation.completed", None]


def test_edit(serving: Serving) -> None:
    (image,) = run("openai.js", "edit", serving.url)["images"]
    assert base64.b64decode(image).startswith(PNG)


def test_models(serving: Serving) -> None:
    assert run("openai.js", "models", serving.url) == {"models": ["latentd-demo"]}


def test_invalid_request(serving: Serving) -> None:
    got = run("openai.js", "invalid", serving.url)
    assert (got["class"], got["status"], got["param"]) == ("BadRequestError", 400, "n")
    assert got["requestID"]


def test_unknown_model(serving: Serving) -> None:
    got = run("openai.js", "unknown", serving.url)
    assert (got["class"], got["code"]) == ("NotFoundError", "model_not_found")


def test_full_queue(full_queue: FullQueue) -> None:
    got = run("openai.js", "full", full_queue.serving.url)
    assert (got["class"], got["code"]) == ("RateLimitError", "rate_limit_exceeded")
    assert 1 <= got["retryAfter"] <= 120


def test_aborting_the_stream_cancels(serving: HeldServing) -> None:
    with Cancelling(serving):
        assert run("openai.js", "cancel", serving.url) == {"first": "image_generation.partial_image"}
