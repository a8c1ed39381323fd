"""Hugging Face's Python client."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.load import Cancelling, FullQueue
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

QUICK = {"num_inference_steps": 4, "seed": 7}
SLOW = {"num_inference_steps": 200}


@pytest.fixture
def client(serving: Serving) -> Iterator[InferenceClient]:
    with InferenceClient(model=f"{serving.url}/generate", api_key="none", timeout=60) as client:
        yield client


def test_picture(client: InferenceClient, serving: Serving) -> None:
    image = client.text_to_image("a red heart", negative_prompt="text", width=64, height=64, guidance_scale=5, **QUICK)
    body = {"prompt": "a red heart", "negative_prompt": "text", "guidance_scale": 5, **QUICK}
    same = serving.client.post("/generate", json=body, headers={"Accept": "image/png"})
    assert (np.asarray(image) == np.asarray(PIL.Image.open(io.BytesIO(same.content)))).all()


def test_parameters_of_the_native_api(client: InferenceClient) -> None:
    one = client.text_to_image("a red heart", scheduler="euler", **QUICK)
    two = client.text_to_image("a red heart", extra_body={"scheduler": "euler", "sigmas": "karras"}, **QUICK)
    assert (np.asarray(one) != np.asarray(two)).any()


def test_image_to_image(client: InferenceClient) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "blue").save(file, "PNG")
    size: Any = {"width": 64, "height": 64}
    image = client.image_to_image(file.getvalue(), prompt="a red heart", target_size=size, strength=0.2, seed=7)
    red, _, blue = np.asarray(image).mean(axis=(0, 1))
    assert blue > red


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: Input should be"),
        ({"width": 512, "height": 512}, "Unsupported size 512x512"),
        ({"extra_body": {"steps": 3}}, "steps: Unknown field: use num_inference_steps"),
        ({"extra_body": {"num_images": 2}}, "one image"),
    ],
)
def test_refusals(client: InferenceClient, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(HfHubHTTPError, match=message) as refused:
        client.text_to_image("a cat", **parameters)
    assert refused.value.response.status_code == 422


def test_full_queue(full_queue: FullQueue) -> None:
    with (
        InferenceClient(model=f"{full_queue.serving.url}/generate", api_key="none", timeout=60) as client,
        pytest.raises(HfHubHTTPError) as refused,
    ):
        client.text_to_image("a cat")
    assert refused.value.response.status_code == 429
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120


async def cancel_once_it_runs(serving: Serving) -> None:
    async with AsyncInferenceClient(model=f"{serving.url}/generate", api_key="none") as client:
        call = asyncio.ensure_future(client.text_to_image("a cat", **SLOW))
        await asyncio.to_thread(wait_until, lambda: serving.metrics()["latentd_requests_running"] == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


def test_dropped_connection_cancels(serving: HeldServing) -> None:
    with Cancelling(serving):
        asyncio.run(cancel_once_it_runs(serving))
