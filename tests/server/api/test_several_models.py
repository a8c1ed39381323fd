"""A server of two models: through every API each makes what it makes alone, and comes and goes without a loss."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from engines.demo import BUNDLE as DEMO
from engines.manifest import Manifest
from server.requests import infotext
from server.runtime.models import needed_memory
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

Image = NDArray[np.uint8]  # [H, W, 3]
SAME = {"prompt": "a red heart", "seed": 7}


@pytest.fixture(scope="module")
def two(bundle: Path) -> Iterator[HeldServing]:
    """A server of the tiny model and of the demo's, called `demo`: leave both loaded, and the first one chosen."""
    with HeldServing(bundle, "--bundle", f"demo={DEMO}") as running:
        yield running


@pytest.fixture(scope="module")
def alone(serving: Serving, demo: Serving, manifest: Manifest) -> Mapping[str, Image]:
    """What each makes in a server of its own."""
    return {manifest.name: native(serving.client, None), "demo": native(demo.client, None)}


def opened(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file))


def pixels(file: bytes | str) -> Image:
    """Of an image file, or of one in base64."""
    return np.asarray(opened(base64.b64decode(file) if isinstance(file, str) else file))


def good(answer: httpx.Response) -> Any:
    assert answer.status_code in (200, 202), answer.text
    return answer.json() if "json" in answer.headers["content-type"] else answer.content


def native(client: httpx.Client, model: str | None) -> Image:
    document = good(client.post("/generate", json={**SAME, "num_inference_steps": 3, "model": model}))
    assert document["model"] == model or not model
    return pixels(document["images"][0]["image"])


def form(client: httpx.Client, model: str) -> Image:
    fields = {**SAME, "num_inference_steps": 3, "model": model}
    parts = {name: (None, str(value)) for name, value in fields.items()}
    return pixels(good(client.post("/generate", files=parts, headers={"Accept": "image/png"})))


def job(client: httpx.Client, model: str) -> Image:
    body = {**SAME, "num_inference_steps": 3, "model": model}
    found = good(client.post("/generate", params={"wait": "false"}, json=body))
    assert found["model"] == model
    wait_until(lambda: good(client.get(f"/jobs/{found['id']}"))["status"] == "completed")
    return pixels(good(client.get(f"/jobs/{found['id']}/image")))


def hugging_face(client: httpx.Client, model: str) -> Image:
    parameters = {"seed": 7, "num_inference_steps": 3, "model": model}
    return pixels(good(client.post("/generate", json={"inputs": SAME["prompt"], "parameters": parameters})))


def openai(client: httpx.Client, model: str) -> Image:
    body = {**SAME, "num_inference_steps": 3, "model": model}
    return pixels(good(client.post("/v1/images/generations", json=body))["data"][0]["b64_json"])


def override(client: httpx.Client, model: str) -> Image:
    settings = {"sd_model_checkpoint": title(client, model)}
    return txt2img(client, model, override_settings=settings)


def options(client: httpx.Client, model: str) -> Image:
    before = good(client.get("/sdapi/v1/options"))
    good(client.post("/sdapi/v1/options", json={**before, "sd_model_checkpoint": title(client, model)}))
    try:
        assert good(client.get("/sdapi/v1/options"))["sd_model_checkpoint"] == title(client, model)
        return txt2img(client, model)
    finally:
        good(client.post("/sdapi/v1/options", json={"sd_model_checkpoint": before["sd_model_checkpoint"]}))


def title(client: httpx.Client, model: str) -> str:
    (found,) = [one["title"] for one in good(client.get("/sdapi/v1/sd-models")) if one["model_name"] == model]
    return str(found)


def txt2img(client: httpx.Client, model: str, **fields: Any) -> Image:
    document = good(client.post("/sdapi/v1/txt2img", json={**SAME, "steps": 3, **fields}))
    assert f'"sd_model_name": "{model}"' in document["info"]
    return pixels(document["images"][0])


@pytest.mark.parametrize("api", [native, form, job, hugging_face, openai, override, options])
def test_every_api_chooses_the_model(
    two: Serving, alone: Mapping[str, Image], api: Callable[[httpx.Client, str], Image]
) -> None:
    for model, expected in alone.items():
        np.testing.assert_array_equal(api(two.client, model), expected)


def test_without_a_name_the_first_one_is_meant(two: Serving, alone: Mapping[str, Image], manifest: Manifest) -> None:
    for model in (None, ""):
        np.testing.assert_array_equal(native(two.client, model), alone[manifest.name])


def test_every_list_has_both(two: Serving, manifest: Manifest) -> None:
    names = [manifest.name, "demo"]
    described = good(two.client.get("/models"))
    assert [(one["name"], one["state"]) for one in described] == [(name, "ready") for name in names]
    assert described[0]["resolutions"] != described[1]["resolutions"]
    assert [one["id"] for one in good(two.client.get("/v1/models"))["data"]] == names
    assert [one["model_name"] for one in good(two.client.get("/sdapi/v1/sd-models"))] == names
    index = [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in names]
    assert good(two.client.post("/v2/repository/index")) == index
    assert {good(two.client.get(f"/v2/models/{name}"))["name"] for name in names} == {*names}
    assert {good(two.client.get(f"/v2/models/{name}/ready"))["ready"] for name in names} == {True}


def test_files_and_refusals_are_of_the_requests_model(two: Serving, manifest: Manifest) -> None:
    size = manifest.resolutions[0]
    for model, status in [(manifest.name, 200), ("demo", 422)]:
        body = {**SAME, "model": model, "width": size.width, "height": size.height, "num_inference_steps": 1}
        answer = two.client.post("/generate", json=body, headers={"Accept": "image/png"})
        assert answer.status_code == status
        if status == 200:
            assert infotext.parse(opened(answer.content).info["parameters"])["Model"] == model


UNKNOWN = ["other", "Demo", "demo ", "../demo", "demo/1", "\x00", "demo\n", "é", "x" * 200, "%64emo", "{0}", "None"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_refused_with_those_that_are_known(two: Serving, name: str) -> None:
    answer = two.client.post("/generate", json={**SAME, "model": name})
    assert answer.status_code == 404
    assert answer.json()["detail"].endswith(": this server has tiny-sd, demo.")
    answer = two.client.post("/v1/images/generations", json={"prompt": "a cat", "model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    answer = two.client.get("/schedulers", params={"model": name})
    assert answer.status_code == 404


def test_names_in_paths_are_nothing_but_names(two: Serving) -> None:
    letters = [*"demo/.%\\:?#[]{}é\"'<>", "..", "%2e%2e", "%2f", "%00", "tiny-sd", "/ready", "/versions/1", "/load"]
    chance = random.Random(5)
    for _ in range(150):
        name = "".join(chance.choices(letters, k=chance.randrange(1, 12)))
        for path, method in [("models/{}", "GET"), ("models/{}/ready", "GET"), ("repository/models/{}/load", "POST")]:
            answer = two.client.request(method, f"/v2/{path.format(name.replace('?', '%3F').replace('#', '%23'))}")
            assert answer.status_code in (200, 404, 405), name
    assert {one["state"] for one in good(two.client.get("/models"))} == {"ready"}


def test_a_caller_chooses_for_itself_alone(two: Serving) -> None:
    with httpx.Client(base_url=two.url, transport=httpx.HTTPTransport(local_address="127.0.0.2")) as other:
        good(other.post("/sdapi/v1/options", json={"sd_model_checkpoint": "demo"}))
        assert good(other.get("/sdapi/v1/options"))["sd_model_checkpoint"] == title(other, "demo")
        assert good(two.client.get("/sdapi/v1/options"))["sd_model_checkpoint"] == title(two.client, "tiny-sd")
        refused = other.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["body", "sd_model_checkpoint"]


def control(two: Serving, action: str, model: str, **request: Any) -> httpx.Response:
    return two.client.post(f"/v2/repository/models/{model}/{action}", **request)


def state(two: Serving, model: str) -> str:
    index = good(two.client.post("/v2/repository/index"))
    return str(next(one["state"] for one in index if one["name"] == model))


@pytest.fixture
def unloaded(two: Serving) -> Iterator[Serving]:
    """The server with the demo's model unloaded, which is loaded again afterwards."""
    assert control(two, "unload", "demo").status_code == 200
    wait_until(lambda: state(two, "demo") == "UNAVAILABLE")
    yield two
    assert control(two, "load", "demo").status_code == 200


def test_a_model_that_is_not_loaded_says_what_to_do(unloaded: Serving) -> None:
    answer = unloaded.client.post("/generate", json={**SAME, "model": "demo"})
    assert answer.status_code == 503
    assert answer.json()["detail"] == (
        "The model demo is not loaded: choose another of GET /models, or have an administrator load it "
        "(POST /v2/repository/models/demo/load)."
    )
    assert unloaded.client.get("/v2/models/demo/ready").status_code == 503
    assert unloaded.client.get("/v2/health/ready").status_code == 200
    ready = good(unloaded.client.post("/v2/repository/index", json={"ready": True}))
    assert [one["name"] for one in ready] == ["tiny-sd"]
    assert control(unloaded, "unload", "demo").status_code == 200  # which it is already


def test_a_model_that_is_loaded_again_makes_the_same(
    unloaded: Serving, alone: Mapping[str, Image], manifest: Manifest
) -> None:
    np.testing.assert_array_equal(native(unloaded.client, manifest.name), alone[manifest.name])
    for _ in range(2):  # the second time it is loaded already
        assert control(unloaded, "load", "demo").status_code == 200
        assert state(unloaded, "demo") == "READY"
    np.testing.assert_array_equal(native(unloaded.client, "demo"), alone["demo"])


def test_others_are_served_while_the_first_is_not_loaded(two: Serving, manifest: Manifest) -> None:
    assert control(two, "unload", manifest.name).status_code == 200
    try:
        wait_until(lambda: state(two, manifest.name) == "UNAVAILABLE")
        assert two.client.post("/generate", json=SAME).status_code == 503
        good(two.client.post("/generate", json={**SAME, "model": "demo", "num_inference_steps": 1}))
    finally:
        assert control(two, "load", manifest.name).status_code == 200
    good(two.client.post("/generate", json={**SAME, "num_inference_steps": 1}))


def test_unloading_under_load_loses_nothing(two: HeldServing, alone: Mapping[str, Image], manifest: Manifest) -> None:
    """Every request has an image that is right, or is refused as the documents say."""

    def ask(number: int) -> str:
        model = "demo" if number % 2 else manifest.name
        answer = two.client.post("/generate", json={**SAME, "num_inference_steps": 3, "model": model})
        if answer.status_code == 503:
            assert "demo" in answer.json()["detail"]
            assert model == "demo"
            return "refused"
        difference = pixels(good(answer)["images"][0]["image"]).astype(float) - alone[model]
        assert np.abs(difference).max() <= 2, "another picture than alone"
        return model

    with ThreadPoolExecutor(48) as threads:
        with two.held():
            answers = [threads.submit(ask, number) for number in range(24)]
            two.wait_for(24)
            two.let(5)
            assert control(two, "unload", "demo").status_code == 200
            answers += [threads.submit(ask, number) for number in range(24, 48)]
        counted = Counter(answer.result() for answer in answers)
    wait_until(lambda: state(two, "demo") == "UNAVAILABLE")
    assert control(two, "load", "demo").status_code == 200
    assert counted == {manifest.name: 24, "demo": 12, "refused": 12}


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"json": {"parameters": {"config": "{}"}}}, 422, "parameters.config: Models are loaded as they were built"),
        ({"json": {"parameters": {"file:1/model.onnx": "AA=="}}}, 422, "parameters.file:1/model.onnx"),
        ({"json": {"parameters": 1}}, 422, "parameters"),
        ({"json": []}, 422, "body"),
        ({"content": b"{"}, 400, "Invalid JSON"),
        ({"headers": {"Origin": "https://evil.example"}}, 403, "another origin"),
        ({"headers": {"Sec-Fetch-Site": "cross-site"}}, 403, "another origin"),
        ({"headers": {"Content-Encoding": "gzip"}}, 415, "uncompressed"),
    ],
)
def test_bad_requests_to_load_or_unload_change_nothing(
    two: Serving, request_: dict[str, Any], status: int, words: str
) -> None:
    for action in ("load", "unload"):
        answer = control(two, action, "demo", **request_)
        assert answer.status_code == status, answer.text
        assert words in answer.json()["error"]
    assert state(two, "demo") == "READY"


def test_what_is_not_given_at_the_start_cannot_be_loaded(two: Serving) -> None:
    for name in ("other", "../bundle", str(DEMO), "demo%2F..%2Fdemo"):
        answer = control(two, "load", name)
        assert answer.status_code == 404
        assert "error" in answer.json()


def test_models_are_loaded_within_a_budget() -> None:
    """Two are loaded at the start, two fit, and the one that had no request for longest makes room for the third."""
    budget = 2.5 * needed_memory(Manifest.read(DEMO), DEMO, "onnxruntime") / 2**20
    others = "--bundle", f"a={DEMO}", "--bundle", f"b={DEMO}"
    with Serving(DEMO, *others, "--load", "a", "--model-memory", str(int(budget))) as three:
        assert [state(three, name) for name in ("latentd-demo", "a", "b")] == ["READY", "READY", "UNAVAILABLE"]
        for model in ("a", None):
            good(three.client.post("/generate", json={**SAME, "model": model, "num_inference_steps": 1}))
        assert control(three, "load", "b").status_code == 200
        assert [state(three, name) for name in ("latentd-demo", "a", "b")] == ["READY", "UNAVAILABLE", "READY"]
        good(three.client.post("/generate", json={**SAME, "model": "b", "num_inference_steps": 1}))
