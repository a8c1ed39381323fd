"""Official clients choose between the models of one server, and load and unload them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator

import openai
import PIL.Image
import pytest
import webuiapi
from huggingface_hub import InferenceClient
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from engines.demo import BUNDLE as DEMO
from server.requests import infotext
from tests.support.serving import Serving

NAMES = ["latentd-demo", "twin"]
QUICK = {"num_inference_steps": 1, "seed": 7}
each_model = pytest.mark.parametrize("model", NAMES)


@pytest.fixture(scope="module")
def two() -> Iterator[Serving]:
    """The demo's model under two names: leave both loaded."""
    with Serving(DEMO, "--bundle", f"twin={DEMO}") as running:
        yield running


def model_in(image: PIL.Image.Image) -> str:
    """The model that the file names."""
    return infotext.parse(image.info["parameters"])["Model"]


@each_model
def test_openai(two: Serving, model: str) -> None:
    with openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == NAMES
        response = client.images.generate(prompt="a cat", model=model, extra_body=QUICK)
        assert response.data
        file = base64.b64decode(response.data[0].b64_json or "")
        assert model_in(PIL.Image.open(io.BytesIO(file))) == model
        with pytest.raises(openai.NotFoundError, match="latentd-demo, twin") as refused:
            client.images.generate(prompt="a cat", model="other")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@each_model
def test_hugging_face(two: Serving, model: str) -> None:
    with InferenceClient(model=f"{two.url}/generate", api_key="none", timeout=60) as client:
        assert model_in(client.text_to_image("a cat", extra_body={"model": model}, **QUICK)) == model


@each_model
def test_webuiapi(two: Serving, model: str) -> None:
    api = webuiapi.WebUIApi(baseurl=f"{two.url}/sdapi/v1")
    assert [name.partition(" ")[0] for name in api.util_get_model_names()] == sorted(NAMES)
    api.util_set_model(model)
    try:
        assert api.util_get_current_model().startswith(f"{model} [")
        result = api.txt2img(prompt="a cat", steps=1, seed=7, width=64, height=64)
    finally:
        api.util_set_model(NAMES[0])
    assert (result.info["sd_model_name"], model_in(result.image)) == (model, model)


def test_triton(two: Serving) -> None:
    with InferenceServerClient(two.url.removeprefix("http://"), network_timeout=120) as client:
        states = {one["name"]: one["state"] for one in client.get_model_repository_index()}
        assert states == dict.fromkeys(NAMES, "READY")
        client.unload_model("twin")
        deadline = time.monotonic() + 60
        while {"name": "twin", "version": "1", "state": "UNAVAILABLE", "reason": ""} not in (
            client.get_model_repository_index()
        ):
            assert time.monotonic() < deadline
        assert not client.is_model_ready("twin")
        assert client.is_model_ready("latentd-demo")
        client.load_model("twin")
        assert client.is_model_ready("twin")
        with pytest.raises(InferenceServerException, match="Models are loaded as they were built"):
            client.load_model("twin", config="{}")
        for name in ("other", "../twin"):
            with pytest.raises(InferenceServerException):
                client.load_model(name)
