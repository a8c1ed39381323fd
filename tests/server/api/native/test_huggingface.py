"""Which bodies of `POST /generate` are Hugging Face's, and what becomes of them; no image model is needed."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.api.bodies import read_either
from server.api.body_limits import BodyLimits
from server.api.error_responses import error_response
from server.api.native import huggingface
from server.api.native.huggingface import HuggingFaceBody
from server.requests.errors import ServerError
from server.requests.schemas import GenerateRequest

app = FastAPI()


@app.post("/generate")
async def read(http: HttpRequest) -> JSONResponse:
    """What was read, and as which of the two."""
    with BodyLimits().lease() as lease:
        body = await read_either(http, GenerateRequest, HuggingFaceBody, lease)
        if isinstance(body, GenerateRequest):
            return JSONResponse({"native": body.model_dump(exclude_unset=True)})
        found = (await huggingface.native(http, body, lease)).model_dump(exclude_unset=True)
        return JSONResponse({"huggingface": {name: str(value) for name, value in found.items()}})


@app.exception_handler(ServerError)
async def _refused(http: HttpRequest, error: ServerError) -> Response:
    return error_response(http, error)


def post(body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/generate", json=body)

    return asyncio.run(send())


def test_native_bodies_stay_native() -> None:
    fields = {"prompt": 'about "inputs"', "num_inference_steps": 3}
    assert post(fields).json() == {"native": fields}


def test_text_to_image() -> None:
    answer = post({"inputs": "a cat", "parameters": {"seed": 7, "guidance_scale": 2, "negative_prompt": None}})
    assert answer.json()["huggingface"] == {
        "prompt": "a cat",
        "seed": "7",
        "guidance_scale": "2.0",
        "negative_prompt": "",
    }
    assert post({"inputs": "a cat"}).json() == {"huggingface": {"prompt": "a cat"}}


def test_image_to_image() -> None:
    parameters = {"prompt": "a cat", "target_size": {"width": 64, "height": 32}, "strength": 0.5}
    found = post({"inputs": "aGVsbG8=", "parameters": parameters}).json()["huggingface"]
    assert found == {"image": "b'hello'", "prompt": "a cat", "width": "64", "height": "32", "strength": "0.5"}
    parameters = {"prompt": "a cat", "target_size": [32, 64]}  # as diffusers means it
    found = post({"inputs": "aGVsbG8=", "parameters": parameters}).json()["huggingface"]
    assert found == {"image": "b'hello'", "prompt": "a cat", "target_size": "(32, 64)"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": 3}, "prompt: Input should be a valid string"),
        ({"inputs": "a cat", "parameters": [1]}, "parameters: Input should be an object."),
        ({"inputs": "a cat", "options": {}}, "options: Unknown field: send inputs and parameters only."),
        ({"inputs": "a cat", "parameters": {"steps": 3}}, "steps: Unknown field: use num_inference_steps"),
        ({"inputs": "a cat", "parameters": {"seed": "7"}}, "seed: Input should be a valid integer"),
        ({"inputs": "a cat", "parameters": {"prompt": "a dog"}}, "image: Input should be valid base64 (RFC 4648)"),
        ({"inputs": "", "parameters": {"prompt": "a", "target_size": 3}}, "target_size: Input should be an object."),
    ],
)
def test_errors_have_its_form(body: Any, message: str) -> None:
    answer = post(body)
    assert (answer.status_code, answer.json()) == (422, {"error": message})


@pytest.mark.parametrize("body", [{"prompt": "a cat", "inputs": "a dog"}, {"text": "a cat"}, [], {"prompt": 3}])
def test_errors_of_other_bodies_are_problem_details(body: Any) -> None:
    answer = post(body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
