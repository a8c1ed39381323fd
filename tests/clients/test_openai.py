"""OpenAI's Python client."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import PIL.Image
import pytest
from numpy.typing import NDArray
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse

from tests.clients.load import Cancelling, FullQueue
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

QUICK = {"num_inference_steps": 4, "seed": 7}
SLOW = {"num_inference_steps": 200}


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(text: str | None) -> NDArray[np.float64]:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text or ""))), np.float64)


def png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def first(response: ImagesResponse) -> NDArray[np.float64]:
    assert response.data
    return pixels(response.data[0].b64_json)


def test_pictures(client: openai.OpenAI, serving: Serving) -> None:
    response = client.images.generate(
        prompt="a red heart", model="latentd-demo", n=2, size="64x64", quality="high", user="me", extra_body=QUICK
    )
    assert response.data
    assert [image.url for image in response.data] == [f"data:image/png;base64,{one.b64_json}" for one in response.data]
    assert (response.size, response.output_format, response.background) == ("64x64", "png", "opaque")
    native = serving.generate(prompt="a red heart", num_images=2, **QUICK).json()["images"]
    for image, same in zip(response.data, native, strict=True):
        assert (pixels(image.b64_json) == pixels(same["image"])).all()
        assert image.model_extra == {"seed": same["seed"], "nsfw_content_detected": None}


@pytest.mark.parametrize(("asked", "missing"), [("url", "b64_json"), ("b64_json", "url")])
def test_response_format(client: openai.OpenAI, asked: Any, missing: str) -> None:
    response = client.images.generate(prompt="a cat", response_format=asked, extra_body=QUICK)
    assert response.data
    assert getattr(response.data[0], asked)
    assert getattr(response.data[0], missing) is None


def test_output_format_and_compression(client: openai.OpenAI) -> None:
    def size(compression: int) -> int:
        response = client.images.generate(
            prompt="a cat", output_format="jpeg", output_compression=compression, extra_body=QUICK
        )
        assert response.data
        file = base64.b64decode(response.data[0].b64_json or "")
        assert PIL.Image.open(io.BytesIO(file)).format == "JPEG"
        return len(file)

    assert size(10) < size(90)


def test_stream_of_partial_images(client: openai.OpenAI) -> None:
    extra = {"num_inference_steps": 8, "seed": 7}
    with client.images.generate(prompt="a red heart", stream=True, partial_images=3, extra_body=extra) as stream:
        *partial, completed = stream
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partial)
    assert [event.partial_image_index for event in partial if event.type == "image_generation.partial_image"] == [
        0,
        1,
        2,
    ]
    assert isinstance(completed, ImageGenCompletedEvent)
    assert completed.usage.total_tokens == completed.usage.input_tokens > 0
    whole = pixels(completed.b64_json)
    assert (whole == first(client.images.generate(prompt="a red heart", extra_body=extra))).all()
    assert pixels(partial[0].b64_json).shape[2] == 3


def test_stream_without_partial_images(client: openai.OpenAI) -> None:
    with client.images.generate(prompt="a red heart", stream=True, extra_body=QUICK) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"]


def test_edit_changes_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    image = PIL.Image.new("RGB", (64, 64), "white")
    mask = PIL.Image.new("RGBA", (64, 64), "white")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    response = client.images.edit(
        image=[png(image)], mask=png(mask), prompt="a red heart on a black background", n=1, extra_body={"seed": 7}
    )
    change = np.abs(first(response) - 255).mean(axis=(0, 2))
    assert change[:24].mean() > 4 * change[40:].mean()


def test_stream_of_an_edit(client: openai.OpenAI) -> None:
    image = png(PIL.Image.new("RGB", (64, 64), "blue"))
    with client.images.edit(image=image, prompt="a red heart", stream=True, partial_images=1) as stream:
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["latentd-demo"]
    assert client.models.retrieve("latentd-demo").object == "model"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("acme/other")
    assert (found.value.code, found.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 11}, "n"),
        ({"n": 9}, "n"),  # more rows than the engines take
        ({"size": "huge"}, "size"),
        ({"size": "512x512"}, "size"),  # which the demo is not built for
        ({"background": "transparent"}, "background"),
        ({"output_format": "svg"}, "output_format"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "n": 2}, "n"),
        ({"size": "64x64", "extra_body": {"width": 64}}, "size"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"steps": 3}}, "steps"),
    ],
)
def test_refusals_name_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", **fields)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert refused.value.request_id


def test_edits_take_one_image(client: openai.OpenAI) -> None:
    image = png(PIL.Image.new("RGB", (64, 64)))
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=[image, image], prompt="a cat")
    assert refused.value.param == "image"


@pytest.mark.parametrize("model", ["gpt-image-2", "dall-e-3"])
def test_other_models_are_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="latentd-demo") as refused:
        client.images.generate(prompt="a cat", model=model)
    assert refused.value.code == "model_not_found"


def test_request_ids_are_the_callers_own(client: openai.OpenAI) -> None:
    headers = {"X-Request-Id": "mine-1"}
    assert client.models.with_raw_response.list(extra_headers=headers).headers["x-request-id"] == "mine-1"
    raw = client.images.with_raw_response.generate(prompt="a cat", extra_body=QUICK, extra_headers=headers)
    assert raw.headers["x-request-id"] == "mine-1"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a cat", n=0, extra_headers=headers)
    assert refused.value.request_id == "mine-1"


def test_full_queue_is_a_rate_limit(full_queue: FullQueue) -> None:
    with (
        openai.OpenAI(base_url=f"{full_queue.serving.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.images.generate(prompt="a cat")
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120


def test_client_comes_back_after_retry_after(full_queue: FullQueue) -> None:
    seen: list[tuple[float, httpx2.Response]] = []

    def note(response: httpx2.Response) -> None:
        seen.append((time.monotonic(), response))
        if response.status_code == 429:
            response.headers["retry-after"] = str(min(int(response.headers["retry-after"]), 2))  # in place of a minute
            full_queue.free()

    http = httpx2.Client(event_hooks={"response": [note]}, timeout=120)
    url = f"{full_queue.serving.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1, http_client=http) as client:
        assert client.images.generate(prompt="a cat", extra_body=QUICK).data
    (refused_at, refused), (done_at, done) = seen
    assert (refused.status_code, done.status_code) == (429, 200)
    assert done_at - refused_at >= int(refused.headers["retry-after"])


def test_closing_the_stream_cancels(client: openai.OpenAI, serving: HeldServing) -> None:
    with Cancelling(serving):
        stream = client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=SLOW)
        assert next(iter(stream)).type == "image_generation.partial_image"
        stream.close()


async def cancel_once_it_runs(serving: Serving) -> None:
    async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
        call = asyncio.ensure_future(client.images.generate(prompt="a cat", n=8, extra_body=SLOW))
        await asyncio.to_thread(wait_until, lambda: serving.metrics()["latentd_requests_running"] == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


def test_dropped_connection_cancels(serving: HeldServing) -> None:
    with Cancelling(serving):
        asyncio.run(cancel_once_it_runs(serving))
