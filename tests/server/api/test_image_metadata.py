"""Files of a running server, read by other programs."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
from collections.abc import Callable

import PIL.Image
import pytest
from sd_parsers import ParserManager
from sd_parsers.data import Generators

from engines.demo import BUNDLE
from server.requests.images import FORMATS, ImageFormat
from tests.support.serving import Serving


@pytest.fixture(scope="module")
def serving(demo: Serving) -> Serving:
    return demo


ASKED = {
    "prompt": "a (red:1.2) boat, café 日本\nat night",
    "negative_prompt": "a bird: blurry, grey",
    "scheduler": "DPM++ 2M Karras",
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "seed": 5,
}


def files(serving: Serving, image_format: ImageFormat, **fields: object) -> list[bytes]:
    answer = serving.generate(**{**ASKED, "image_format": image_format, **fields})
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["image"]) for image in answer.json()["images"]]


@pytest.mark.parametrize("image_format", FORMATS)
def test_sd_parsers_reads_the_settings_of_each_image(serving: Serving, image_format: ImageFormat) -> None:
    for seed, file in zip((5, 6), files(serving, image_format, num_images=2), strict=True):
        info = ParserManager().parse(io.BytesIO(file))
        assert info
        assert info.generator == Generators.AUTOMATIC1111
        assert info.full_prompt == ASKED["prompt"]
        assert info.full_negative_prompt == ASKED["negative_prompt"]
        (sampler,) = info.samplers
        assert sampler.name == "DPM++ 2M"
        assert sampler.parameters == {"steps": "3", "cfg_scale": "2.5", "seed": str(seed), "scheduler": "Karras"}
        assert sampler.model
        assert sampler.model.name == serving.client.get("/models").json()[0]["name"]
        assert info.metadata["Size"] == "64x64"
        assert info.metadata["Version"].startswith("latentd ")


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_that_is_not_in_json_says_the_same(serving: Serving, image_format: ImageFormat) -> None:
    answer = serving.client.post("/generate", json=ASKED, headers={"Accept": f"image/{image_format}"})
    assert answer.content == files(serving, image_format)[0]


def test_an_edited_image_says_so(serving: Serving) -> None:
    (original,) = files(serving, "png")
    (file,) = files(serving, "png", image=base64.b64encode(original).decode(), strength=0.9)
    picture = PIL.Image.open(io.BytesIO(file))
    assert "compositeWithTrainedAlgorithmicMedia" in picture.info["XML:com.adobe.xmp"]
    assert "Denoising strength: 0.9" in picture.info["parameters"]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.skipif(not shutil.which("exiftool"), reason="needs exiftool")
def test_exiftool_reads_the_source_type(serving: Serving, image_format: ImageFormat) -> None:
    command = ["exiftool", "-s3", "-XMP-iptcExt:DigitalSourceType#", "-"]
    file = files(serving, image_format)[0]
    found = subprocess.run(command, input=file, capture_output=True, check=True)  # noqa: S603 - our own command
    assert found.stdout.strip().endswith(b"digitalsourcetype/trainedAlgorithmicMedia")


def test_metadata_can_be_switched_off() -> None:
    with Serving(BUNDLE, "--no-embed-parameters", "--no-mark-ai") as bare:
        (file,) = files(bare, "png")
        assert not PIL.Image.open(io.BytesIO(file)).info


def native(serving: Serving) -> bytes:
    return files(serving, "png")[0]


def openai(serving: Serving) -> bytes:
    answer = serving.client.post("/v1/images/generations", json={"prompt": "a boat", "num_inference_steps": 1})
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def openai_edit(serving: Serving) -> bytes:
    sent = {"image": ("a.png", native(serving), "image/png")}
    answer = serving.client.post("/v1/images/edits", data={"prompt": "a boat"}, files=sent)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def a1111(serving: Serving) -> bytes:
    answer = serving.client.post("/sdapi/v1/txt2img", json={"prompt": "a boat", "steps": 1})
    return base64.b64decode(answer.json()["images"][0])


def hugging_face(serving: Serving) -> bytes:
    fields = {"inputs": "a boat", "parameters": {"num_inference_steps": 1}}
    return serving.client.post("/generate", json=fields).content


def job(serving: Serving) -> bytes:
    fields = {"prompt": "a boat", "num_inference_steps": 1}
    location = serving.client.post("/generate?wait=false", json=fields).headers["Location"]
    for _ in range(10_000):
        answer = serving.client.get(f"{location}/image")
        if answer.status_code == 200:
            break
    return answer.content


@pytest.mark.parametrize(
    ("ask", "api"),
    [
        (native, "generate"),
        (openai, "openai"),
        (openai_edit, "openai"),
        (a1111, "sdapi"),
        (hugging_face, "huggingface"),
        (job, "jobs"),
    ],
)
def test_images_of_every_api_carry_the_same_and_are_counted_as_its_own(
    serving: Serving, ask: Callable[[Serving], bytes], api: str
) -> None:
    before = serving.total("latentd_requests_total", api=api, outcome="completed")
    picture = PIL.Image.open(io.BytesIO(ask(serving)))
    assert serving.total("latentd_requests_total", api=api, outcome="completed") == before + 1
    if picture.format == "PNG":
        assert "Steps: " in picture.info["parameters"]
    assert "trainedAlgorithmicMedia" in str(picture.getxmp()).replace("compositeWithT", "t")
