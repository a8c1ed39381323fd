"""The sizes that condition Stable Diffusion XL, through every API, in its answers and in image files."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from server.requests.schemas import SIZE_CONDITIONS
from tests.support.serving import Serving

Pixels = NDArray[np.uint8]
Sizes = Mapping[str, Any]

SAME = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 2}
SIZES: Sizes = {"original_size": [64, 96], "crops_coords_top_left": [0, 7], "target_size": [40, 24]}


def good(answer: httpx.Response) -> httpx.Response:
    assert answer.status_code in (200, 202), answer.text
    return answer


def opened(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file))


def pixels(file: bytes) -> Pixels:
    return np.asarray(opened(file))


def native(client: httpx.Client, sizes: Sizes) -> bytes:
    answer = good(client.post("/generate", json={**SAME, **sizes}))
    return base64.b64decode(answer.json()["images"][0]["image"])


def form(client: httpx.Client, sizes: Sizes) -> bytes:
    parts = {name: (None, str(value)) for name, value in {**SAME, **sizes}.items()}
    return good(client.post("/generate", files=parts, headers={"Accept": "image/png"})).content


def again(client: httpx.Client, sizes: Sizes) -> bytes:
    """By the parameters that an answer repeats."""
    parameters = good(client.post("/generate", json={**SAME, **sizes})).json()["parameters"]
    assert {name: parameters[name] for name in sizes} == sizes
    return base64.b64decode(good(client.post("/generate", json=parameters)).json()["images"][0]["image"])


def job(client: httpx.Client, sizes: Sizes) -> bytes:
    body = good(client.post("/generate", params={"wait": "false"}, json={**SAME, **sizes})).json()
    until = time.monotonic() + 60
    while (found := good(client.get(f"/jobs/{body['id']}")).json())["status"] != "completed":
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return good(client.get(f"/jobs/{body['id']}/image")).content


def hugging_face(client: httpx.Client, sizes: Sizes) -> bytes:
    parameters = {"seed": 7, "num_inference_steps": 2, **sizes}
    return good(client.post("/generate", json={"inputs": SAME["prompt"], "parameters": parameters})).content


def openai(client: httpx.Client, sizes: Sizes) -> bytes:
    answer = good(client.post("/v1/images/generations", json={**SAME, **sizes}))
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


@pytest.mark.parametrize("api", [form, again, job, hugging_face, openai])
def test_every_api_tells_them(xl_serving: Serving, api: Callable[[httpx.Client, Sizes], bytes]) -> None:
    usual, expected = (native(xl_serving.client, sizes) for sizes in ({}, SIZES))
    assert not np.array_equal(pixels(usual), pixels(expected)), "they change nothing: this proves nothing"
    np.testing.assert_array_equal(pixels(api(xl_serving.client, SIZES)), pixels(expected))


def test_the_web_uis_api_has_none_and_takes_the_defaults(xl_serving: Serving) -> None:
    answer = good(xl_serving.client.post("/sdapi/v1/txt2img", json={"prompt": "a red cat", "seed": 7, "steps": 2}))
    ours = pixels(base64.b64decode(answer.json()["images"][0]))
    np.testing.assert_array_equal(ours, pixels(native(xl_serving.client, {})))


def test_files_say_those_that_are_not_the_defaults(xl_serving: Serving) -> None:
    texts = [opened(native(xl_serving.client, sizes)).info["parameters"] for sizes in ({}, SIZES)]
    assert "Original size" not in texts[0]
    assert "Original size: 96x64, Target size: 24x40, Crop left: 7" in texts[1]


@pytest.mark.parametrize("name", SIZE_CONDITIONS)
def test_another_model_of_the_server_refuses_them(xl_serving: Serving, name: str) -> None:
    for path, status in (("/generate", 422), ("/v1/images/generations", 400)):
        answer = xl_serving.client.post(path, json={**SAME, "model": "sd", name: SIZES[name]})
        assert answer.status_code == status
        assert f"This model has no {name}" in json.dumps(answer.json())
    null = xl_serving.generate(**{**SAME, "model": "sd", name: None})
    assert good(null).json()["parameters"][name] is None


def test_descriptions_say_which_model_has_them(xl_serving: Serving) -> None:
    models = good(xl_serving.client.get("/models")).json()
    assert [model["size_conditions"] for model in models] == [True, False]
    for model in models:
        inputs = good(xl_serving.client.get(f"/v2/models/{model['name']}")).json()["inputs"]
        shapes = {one["name"]: one["shape"] for one in inputs if one["name"] in SIZE_CONDITIONS}
        assert shapes == ({name: [2] for name in SIZE_CONDITIONS} if model["size_conditions"] else {})
    document = good(xl_serving.client.get("/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {*SIZE_CONDITIONS} <= body["properties"].keys()
