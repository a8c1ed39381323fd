"""What decodes the images of a request, through every API that has the choice, in its answers and in image files."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from diffusers import AutoencoderTiny
from numpy.typing import NDArray

from engines.accuracy import psnr
from tests.support import safety
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures

SAME: dict[str, Any] = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 2}
THEIRS = {"prompt": "a red cat", "seed": 7, "steps": 2}  # in the words of AUTOMATIC1111's web UI


@pytest.fixture(scope="module")
def running(fast_bundle: Path) -> Iterator[Serving]:
    with Serving(fast_bundle, "--decode-chunk", "2") as running:
        yield running


def opened(file: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(file))


def good(answer: httpx.Response) -> httpx.Response:
    assert answer.status_code in (200, 202), answer.text
    return answer


def native(client: httpx.Client, **fields: Any) -> bytes:
    answer = good(client.post("/generate", json={**SAME, **fields}))
    return base64.b64decode(answer.json()["images"][0]["image"])


def form(client: httpx.Client) -> bytes:
    parts = {name: (None, str(value)) for name, value in {**SAME, "decoder": "Fast"}.items()}
    return good(client.post("/generate", files=parts, headers={"Accept": "image/png"})).content


def again(client: httpx.Client) -> bytes:
    """By the parameters that an answer repeats."""
    parameters = good(client.post("/generate", json={**SAME, "decoder": "fast"})).json()["parameters"]
    assert parameters["decoder"] == "fast"
    return native(client, **parameters)


def job(client: httpx.Client) -> bytes:
    body = good(client.post("/generate", params={"wait": "false"}, json={**SAME, "decoder": "fast"})).json()
    until = time.monotonic() + 300
    while (found := good(client.get(f"/jobs/{body['id']}")).json())["status"] != "completed":
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return good(client.get(f"/jobs/{body['id']}/image")).content


def web_ui(client: httpx.Client, method: object = "TAESD") -> bytes:
    settings = {"sd_vae_decode_method": method}
    answer = good(client.post("/sdapi/v1/txt2img", json={**THEIRS, "override_settings": settings})).json()
    assert answer["parameters"]["override_settings"] == settings
    return base64.b64decode(answer["images"][0])


def openai(client: httpx.Client) -> bytes:
    body = {**SAME, "response_format": "b64_json", "decoder": "fast"}
    return base64.b64decode(good(client.post("/v1/images/generations", json=body)).json()["data"][0]["b64_json"])


def pixels(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(opened(file))


def test_the_image_is_that_of_diffusers_with_this_decoder(
    running: Serving, checked_checkpoint: Path, distilled: Path
) -> None:
    pipeline = load_pipeline(checked_checkpoint)
    pipeline.vae = AutoencoderTiny.from_pretrained(distilled)
    body = {"prompt": "a red cat", "num_inference_steps": 5, "width": 32, "height": 32}
    ours, usual = (
        pictures(running.generate(**body, seed=7, scheduler="ddim", decoder=one))[0] for one in ("fast", "vae")
    )
    theirs = draw(pipeline, scheduler="ddim", seed=7, **body)
    assert theirs.std() > 5
    assert psnr(ours, theirs) >= 45
    assert psnr(ours, usual) < 30, "both decoders make the same image: this proves nothing"


@pytest.mark.parametrize("api", [form, again, job, openai, web_ui])
def test_every_api_takes_the_choice(running: Serving, api: Callable[[httpx.Client], bytes]) -> None:
    np.testing.assert_array_equal(pixels(api(running.client)), pixels(native(running.client, decoder="fast")))


@pytest.mark.parametrize("decoder", ["vae", None])
def test_unless_chosen_it_is_the_vae(running: Serving, decoder: str | None) -> None:
    usual = pixels(native(running.client))
    np.testing.assert_array_equal(pixels(native(running.client, decoder=decoder)), usual)
    np.testing.assert_array_equal(pixels(web_ui(running.client, "Full")), usual)


def test_files_say_it_in_the_web_uis_words(running: Serving) -> None:
    texts = [opened(native(running.client, decoder=one)).info["parameters"] for one in ("vae", "fast")]
    assert "Decoder" not in texts[0]
    assert ", VAE Decoder: TAESD, " in texts[1]
    assert opened(web_ui(running.client)).info["parameters"] == texts[1]


def test_the_safety_checker_reads_what_either_makes(
    running: Serving, checked_checkpoint: Path, distilled: Path
) -> None:
    pipeline = safety.checking_pipeline(checked_checkpoint)
    pipeline.vae = AutoencoderTiny.from_pretrained(distilled)
    theirs = [safety.draw(pipeline, seed).nsfw_content_detected[0] for seed in safety.SEEDS]
    usual, ours = (
        [
            image["nsfw_content_detected"]
            for seed in (0, len(theirs) // 2)
            for image in good(
                running.generate(**safety.REQUEST, seed=seed, num_images=len(theirs) // 2, decoder=one)
            ).json()["images"]
        ]
        for one in ("vae", "fast")
    )
    assert ours == theirs
    assert ours != usual, "both have the same verdicts: this proves nothing"


def test_descriptions_say_which_model_has_one(running: Serving, serving: Serving) -> None:
    assert [one.client.get("/models").json()[0]["fast_decoder"] for one in (running, serving)] == [True, False]
    assert serving.client.get("/sdapi/v1/options").json()["sd_vae_decode_method"] == "Full"


def test_a_model_without_one_says_how_to_build_it(serving: Serving) -> None:
    answer = serving.generate(**SAME, decoder="fast")
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"] == "decoder"
    assert "build_engines.py --decoder" in error["message"]
    settings = {"sd_vae_decode_method": "TAESD"}
    answer = serving.client.post("/sdapi/v1/txt2img", json={**THEIRS, "override_settings": settings})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "override_settings", "sd_vae_decode_method"]


@pytest.mark.parametrize("method", ["taesd", 1, ["TAESD"]])
def test_a_method_that_the_web_ui_does_not_have_is_refused(serving: Serving, method: object) -> None:
    settings = {"sd_vae_decode_method": method}
    answer = serving.client.post("/sdapi/v1/txt2img", json={**THEIRS, "override_settings": settings})
    assert answer.status_code == 422
    assert "Full or TAESD" in answer.text
