"""Clients that send an API key, and what each makes of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import webuiapi
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from requests.exceptions import RequestException
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from engines.demo import BUNDLE as DEMO
from server.access import keys
from tests.support.serving import Serving

KEY, HASTY, WRONG = (keys.new_key() for _ in range(3))
PROMPT = "a red heart"
QUICK = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    hasty = keys.entry("hasty", HASTY, admin=False) + 'rate = "1/hour"\n'
    path.write_text(keys.entry("me", KEY, admin=True) + "\n" + hasty)
    with Serving(DEMO, "--api-keys", str(path)) as running:
        yield running


@contextmanager
def openai_client(serving: Serving, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_openai(keyed: Serving) -> None:
    with openai_client(keyed, KEY) as client:
        assert client.images.generate(prompt=PROMPT, size="64x64", extra_body=QUICK).data
    with openai_client(keyed, WRONG) as client:
        with pytest.raises(openai.AuthenticationError, match="not known") as caught:
            client.images.generate(prompt=PROMPT)
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_openai_over_its_rate(keyed: Serving) -> None:
    with openai_client(keyed, HASTY) as client:
        client.images.generate(prompt=PROMPT, extra_body=QUICK)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt=PROMPT, extra_body=QUICK)
        assert int(caught.value.response.headers["Retry-After"]) > 3000


def test_huggingface(keyed: Serving) -> None:
    address = f"{keyed.url}/generate"
    assert InferenceClient(model=address, api_key=KEY).text_to_image(PROMPT, **QUICK).size == (64, 64)
    with pytest.raises(HfHubHTTPError) as caught:
        InferenceClient(model=address, api_key=WRONG).text_to_image(PROMPT, **QUICK)
    assert caught.value.response.status_code == 401


@contextmanager
def webui(serving: Serving, key: str) -> Iterator[webuiapi.WebUIApi]:
    api = webuiapi.WebUIApi(baseurl=f"{serving.url}/sdapi/v1", username="anyone", password=key)
    yield api
    api.session.close()


def test_webuiapi(keyed: Serving) -> None:
    with webui(keyed, KEY) as api:
        assert api.txt2img(prompt=PROMPT, width=64, height=64, steps=2).image.size == (64, 64)
    with webui(keyed, WRONG) as api, pytest.raises((RuntimeError, RequestException), match="401"):
        api.txt2img(prompt=PROMPT)


def test_basic_is_asked_for_where_its_clients_are(keyed: Serving) -> None:
    answer = httpx.get(f"{keyed.url}/sdapi/v1/samplers")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith('Basic realm="latentd"')
    assert httpx.get(f"{keyed.url}/sdapi/v1/samplers", auth=("anyone", KEY)).status_code == 200


def test_triton(keyed: Serving) -> None:
    client: Any = InferenceServerClient(keyed.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "latentd"
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.is_model_ready("latentd-demo", headers=headers)
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("latentd-demo")
    client.close()
