"""Image-to-image and inpainting, compared with diffusers, and invalid requests."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

from engines.accuracy import psnr
from engines.schedulers import METHODS
from tests.support.image_files import mask, picture, saved, text_of
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures

BODY: dict[str, Any] = {"prompt": "a red cat on a blue hill", "negative_prompt": "rain", "num_inference_steps": 10}


@pytest.fixture(scope="module")
def image_to_image(checkpoint: Path) -> Any:
    return StableDiffusionImg2ImgPipeline(**load_pipeline(checkpoint).components, requires_safety_checker=False)


@pytest.fixture(scope="module")
def inpainting(checkpoint: Path) -> Any:
    return StableDiffusionInpaintPipeline(**load_pipeline(checkpoint).components, requires_safety_checker=False)


@pytest.fixture(autouse=True)
def _named(checkpoint: Path, image_to_image: Any, inpainting: Any) -> None:
    for pipeline in (image_to_image, inpainting):
        pipeline.register_to_config(_name_or_path=str(checkpoint))
        pipeline.set_progress_bar_config(disable=True)


@pytest.mark.parametrize("scheduler", METHODS)
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_image_to_image_matches_diffusers(
    serving: Serving, image_to_image: Any, scheduler: str, strength: float
) -> None:
    original = picture(48, 32)
    body = {**BODY, "strength": strength, "guidance_scale": 5.0}
    size = {"width": 48, "height": 32}
    ours = pictures(serving.generate(**body, **size, seed=5, scheduler=scheduler, image=text_of(original)))[0]
    theirs = draw(image_to_image, scheduler=scheduler, seed=5, image=original, **body)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(ours, theirs) >= 45


@pytest.mark.parametrize("scheduler", METHODS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_matches_diffusers(serving: Serving, inpainting: Any, scheduler: str, strength: float) -> None:
    original, where = picture(48, 32), mask(48, 32)
    body = {**BODY, "strength": strength, "guidance_scale": 5.0, "width": 48, "height": 32}
    sent = {"image": text_of(original), "mask": text_of(where)}
    ours = pictures(serving.generate(**body, **sent, seed=5, scheduler=scheduler))[0]
    theirs = draw(inpainting, scheduler=scheduler, seed=5, image=original, mask_image=where, **body)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(ours, theirs) >= 45


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_init_image_of_another_size_is_resized_as_in_diffusers(serving: Serving, inpainting: Any, kind: str) -> None:
    original, where = picture(131, 57), mask(77, 99)
    read = PIL.Image.open(io.BytesIO(saved(original, kind)))
    body = {**BODY, "width": 32, "height": 32, "guidance_scale": 1.0, "strength": 0.7, "scheduler": "ddim", "seed": 8}
    ours = pictures(serving.generate(**body, image=text_of(original, kind), mask=text_of(where)))[0]
    theirs = draw(inpainting, image=read, mask_image=where, **body)
    assert psnr(ours, theirs) >= 45


def test_the_area_outside_the_mask_is_kept(serving: Serving) -> None:
    """With all of it left out, neither words nor steps have a say."""
    sent = {"image": text_of(picture(32, 32)), "mask": text_of(PIL.Image.new("L", (32, 32))), "seed": 3}
    one, other = (
        pictures(serving.generate(prompt=prompt, scheduler=scheduler, num_inference_steps=steps, **sent))[0]
        for prompt, scheduler, steps in [("a red cat", "euler", 3), ("two old boats", "dpmpp_2m_sde", 7)]
    )
    assert psnr(one, other) >= 50


def test_each_seed_can_be_generated_alone(serving: Serving) -> None:
    sent = {**BODY, "image": text_of(picture(32, 32)), "mask": text_of(mask(32, 32)), "scheduler": "euler_ancestral"}
    answer = serving.generate(**sent, seed=40, num_images=3, strength=0.8)
    several = pictures(answer)
    assert [image["seed"] for image in answer.json()["images"]] == [40, 41, 42]
    for seed, together in zip((40, 41, 42), several, strict=True):
        assert psnr(together, pictures(serving.generate(**sent, seed=seed, strength=0.8))[0]) >= 50


def test_a_form_gives_the_same_images_as_json(serving: Serving) -> None:
    original, where = picture(32, 32), mask(32, 32)
    fields = {"prompt": "a red cat", "num_inference_steps": 6, "seed": 2, "scheduler": "Euler a", "strength": 0.9}
    ours = serving.generate(**fields, image=text_of(original), mask=text_of(where))
    files = {"image": ("x.png", saved(original)), "mask": ("y.png", saved(where))}
    theirs = serving.client.post("/generate", data={name: str(value) for name, value in fields.items()}, files=files)
    assert pictures(ours)[0].tolist() == pictures(theirs)[0].tolist()
    assert ours.json()["parameters"] == theirs.json()["parameters"]


def test_without_a_size_the_nearest_aspect_ratio_is_used(serving: Serving) -> None:
    for width, height, expected in [(90, 60, (32, 48)), (60, 60, (32, 32)), (30, 90, (32, 32))]:
        drawn = pictures(serving.generate(**BODY, image=text_of(picture(width, height)), strength=0.2))[0]
        assert drawn.shape[:2] == expected


def test_the_response_contains_the_strength(serving: Serving) -> None:
    image, where = text_of(picture(32, 32)), text_of(mask(32, 32))
    for sent, strength in [({}, None), ({"image": image}, 0.8), ({"image": image, "mask": where}, 1.0)]:
        answer = serving.generate(prompt="a", num_inference_steps=2, **sent)
        assert answer.json()["parameters"]["strength"] == strength


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"strength": 0.5}, "strength", "send image too"),
        ({"mask": "image"}, "mask", "send image too"),
        ({"image": "image", "strength": 0.04}, "strength", "give no denoising step"),
        ({"image": "https://example.com/cat.png"}, "image", "URLs are not fetched"),
        ({"image": "text"}, "image", "PNG, JPEG or WebP"),
        ({"image": "image", "mask": "text"}, "mask", "PNG, JPEG or WebP"),
    ],
)
def test_contradictory_fields_are_rejected(serving: Serving, fields: dict[str, Any], field: str, words: str) -> None:
    known = {"image": text_of(picture(32, 32)), "text": base64.b64encode(b"no picture at all").decode()}
    sent = {name: known.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
    answer = serving.generate(**BODY, **sent)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field
    assert words in answer.json()["errors"][0]["message"]


def test_a_transparent_hole_is_regenerated_as_the_same_mask_in_white(serving: Serving) -> None:
    """OpenAI's edits send the image itself with a hole in it."""
    where = mask(32, 32)
    holed = picture(32, 32).convert("RGBA")
    holed.putalpha(where.point(lambda value: 255 - value))
    sent = {
        **BODY,
        "negative_prompt": "",
        "image": text_of(picture(32, 32)),
        "seed": 4,
        "scheduler": "euler",
        "guidance_scale": 1.0,
    }
    by_white, by_hole = (serving.generate(**sent, mask=text_of(one)) for one in (where, holed))
    assert pictures(by_white)[0].tolist() == pictures(by_hole)[0].tolist()
    assert by_white.json()["warnings"] == []
    assert by_hole.json()["warnings"] == [
        "mask: Its transparent areas are regenerated and its colours are ignored: send it without transparency to have "
        "its white areas regenerated."
    ]
    alone = where.convert("RGBA")
    alone.putalpha(where.point(lambda value: 255 - value))  # colours and transparency say the same
    assert serving.generate(**sent, mask=text_of(alone)).json()["warnings"] == []
