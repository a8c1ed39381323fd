"""Models whose UNets take a mask and the masked image, compared with diffusers' inpainting pipelines."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import pytest
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

from engines.accuracy import psnr
from engines.manifest import Manifest
from tests.conftest import build_like
from tests.support.bare_server import wait_until
from tests.support.image_files import picture, saved, text_of
from tests.support.meeting import HeldServing
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures
from tests.support.shared import made_once
from tests.support.tiny import make_checkpoint

BODY: dict[str, Any] = {
    "prompt": "a red cat on a blue hill",
    "negative_prompt": "rain",
    "num_inference_steps": 8,
    "guidance_scale": 5.0,
    "width": 48,
    "height": 32,
}
SCHEDULERS = ["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m", "heun", "lcm"]


@pytest.fixture(scope="session")
def xl_inpainting_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "tiny-xl-inpaint", lambda folder: make_checkpoint(folder, "xl-inpaint"))


@pytest.fixture(scope="session")
def xl_inpainting_bundle(
    xl_inpainting_checkpoint: Path, xl_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return made_once(
        tmp_path_factory, "xl-inpainting-bundle", lambda out: build_like(xl_bundle, xl_inpainting_checkpoint, out)
    )


@pytest.fixture(scope="module")
def serving(inpainting_bundle: Path) -> Iterator[HeldServing]:
    with HeldServing(inpainting_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def xl_serving(xl_inpainting_bundle: Path) -> Iterator[HeldServing]:
    with HeldServing(xl_inpainting_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def reference(inpainting_checkpoint: Path) -> Any:
    return named(
        StableDiffusionInpaintPipeline(
            **load_pipeline(inpainting_checkpoint).components, requires_safety_checker=False
        ),
        inpainting_checkpoint,
    )


@pytest.fixture(scope="module")
def xl_reference(xl_inpainting_checkpoint: Path) -> Any:
    components = load_pipeline(xl_inpainting_checkpoint).components
    return named(StableDiffusionXLInpaintPipeline(**components, add_watermarker=False), xl_inpainting_checkpoint)


def named(pipeline: Any, checkpoint: Path) -> Any:
    """The pipeline, which knows where its schedulers' config is."""
    pipeline.register_to_config(_name_or_path=str(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ellipse(width: int, height: int) -> PIL.Image.Image:
    """A mask with soft edges, which cuts through blocks of latents."""
    mask = PIL.Image.new("L", (4 * width, 4 * height))
    PIL.ImageDraw.Draw(mask).ellipse((width, height, 3 * width, 3.5 * height), fill=255)
    return mask.resize((width, height), PIL.Image.Resampling.BILINEAR)


def hole(width: int, height: int) -> PIL.Image.Image:
    """The same mask by transparency, in a picture."""
    image = picture(width, height)
    image.putalpha(ellipse(width, height).point(lambda value: 0 if value >= 128 else 255))
    return image


MASKS: dict[str, tuple[PIL.Image.Image, PIL.Image.Image]] = {  # what is sent, and what diffusers is given
    "an ellipse of another shape": (ellipse(77, 99), ellipse(77, 99)),
    "transparency": (hole(48, 32), ellipse(48, 32).point(lambda value: 255 if value >= 128 else 0)),
    "all black": (PIL.Image.new("L", (48, 32)), PIL.Image.new("L", (48, 32))),
    "all white": (PIL.Image.new("L", (9, 7), 255), PIL.Image.new("L", (9, 7), 255)),
}


def sent(image: PIL.Image.Image, mask: PIL.Image.Image | None = None) -> dict[str, str]:
    return {"image": text_of(image)} | ({"mask": text_of(mask)} if mask else {})


def one(serving: Serving, **fields: Any) -> Any:
    return pictures(serving.generate(**{**BODY, **fields}))[0]


def test_the_manifest_says_that_it_inpaints(inpainting_bundle: Path, serving: Serving, bundle: Path) -> None:
    manifest = Manifest.load(inpainting_bundle)
    assert manifest.is_for_inpainting
    assert not Manifest.load(bundle).is_for_inpainting
    assert manifest.latent.channels == 4
    assert serving.client.get("/models").json()[0]["is_for_inpainting"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_it_draws_what_diffusers_draws(serving: Serving, reference: Any, scheduler: str, strength: float) -> None:
    original, mask, seed = picture(48, 32), ellipse(48, 32), 5
    body = {**BODY, "strength": strength}
    ours = one(serving, **sent(original, mask), strength=strength, scheduler=scheduler, seed=seed)
    theirs = draw(reference, scheduler=scheduler, seed=seed, image=original, mask_image=mask, **body)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(ours, theirs) >= 45


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_are_read_as_in_diffusers(serving: Serving, reference: Any, kind: str) -> None:
    mask, equivalent = MASKS[kind]
    original = picture(131, 57)
    ours = one(serving, **sent(original, mask), scheduler="ddim", seed=8, guidance_scale=1.0)
    body = {**BODY, "guidance_scale": 1.0}
    theirs = draw(reference, scheduler="ddim", seed=8, image=original, mask_image=equivalent, **body)
    assert psnr(ours, theirs) >= 45


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_without_a_mask_everything_is_repainted(serving: Serving, reference: Any, strength: float) -> None:
    original, white = picture(48, 32), PIL.Image.new("L", (48, 32), 255)
    ours = one(serving, **sent(original), strength=strength, scheduler="euler", seed=2)
    masked = one(serving, **sent(original, white), strength=strength, scheduler="euler", seed=2)
    assert ours.tolist() == masked.tolist()
    body = {**BODY, "strength": strength}
    theirs = draw(reference, scheduler="euler", seed=2, image=original, mask_image=white, **body)
    assert psnr(ours, theirs) >= 45


def test_text_to_image_repaints_a_blank_image(serving: Serving, reference: Any) -> None:
    blank = {"image": picture(48, 32), "mask_image": PIL.Image.new("L", (48, 32), 255)}
    answer = serving.generate(**BODY, scheduler="euler_ancestral", seed=4)
    assert answer.json()["parameters"]["strength"] is None
    theirs = draw(reference, scheduler="euler_ancestral", seed=4, **blank, **BODY)
    assert psnr(pictures(answer)[0], theirs) >= 45


def test_the_mask_hides_the_image_and_decides_the_picture(serving: Serving) -> None:
    """What it covers has no say, and what it does not cover has."""
    original, mask = picture(48, 32), ellipse(48, 32)
    covered, uncovered = original.copy(), PIL.ImageOps.invert(original)
    covered.paste((255, 0, 255), (22, 14, 26, 18))
    uncovered.paste(original, mask=mask.point(lambda value: 255 if value else 0))
    first, second, third = (one(serving, **sent(image, mask), seed=1) for image in (original, covered, uncovered))
    assert first.tolist() == second.tolist()
    assert psnr(first, third) < 45


def crowd() -> list[dict[str, Any]]:
    """Requests of every kind, some with several images, guided and unguided, with the step cache and without."""
    original, mask = picture(48, 32), ellipse(48, 32)
    kinds: list[dict[str, str]] = [sent(original, mask), sent(original), {}]
    return [
        {
            **BODY,
            **kinds[index % 3],
            "seed": 50 + index,
            "scheduler": SCHEDULERS[index % len(SCHEDULERS)],
            "num_inference_steps": 4 + index % 5,
            "guidance_scale": [5.0, 1.0][index % 2],
            "num_images": [1, 3][index % 4 == 0],
            "cache": ["off", "fast"][index % 5 == 0],
            **({"strength": [0.5, 1.0][index % 2]} if index % 3 < 2 else {}),
        }
        for index in range(12)
    ]


def test_in_a_crowd_each_has_the_picture_that_it_has_alone(serving: HeldServing) -> None:
    bodies = crowd()
    alone = [pictures(serving.generate(**body)) for body in bodies]
    together = [pictures(one) for one in serving.together(*(partial(serving.generate, **body) for body in bodies))]
    assert min(psnr(*pair) for pairs in zip(alone, together, strict=True) for pair in zip(*pairs, strict=True)) >= 50
    assert psnr(alone[0][0], alone[0][1]) < 45, "images of one request differ by their seeds"


def cancel_while_running(serving: Serving, body: dict[str, Any]) -> None:
    job = serving.client.post("/generate?wait=false", json=body).headers["Location"]
    wait_until(lambda: serving.client.get(job).json()["step"] > 1)
    assert serving.client.delete(job).status_code == 202
    wait_until(lambda: serving.client.get(job).json()["status"] == "cancelled")


def test_cancelled_requests_leave_nothing_behind(inpainting_bundle: Path, serving: Serving) -> None:
    """As many as fill every slot: no slot, no latents of a masked image and no row of the context pool are lost."""
    fields: dict[str, Any] = {**BODY, **sent(picture(48, 32), ellipse(48, 32)), "scheduler": "ddim"}
    before = one(serving, **fields, seed=6)
    other = {**fields, **sent(picture(131, 57)), "num_inference_steps": 200, "num_images": 2}
    for _ in range(Manifest.read(inpainting_bundle).slots // 2 + 1):
        cancel_while_running(serving, other)
    assert serving.metrics()["latentd_requests_running"] == 0
    assert np.array_equal(one(serving, **fields, seed=6), before)


def test_each_seed_can_be_generated_alone(serving: Serving) -> None:
    fields = {**sent(picture(48, 32), ellipse(48, 32)), "strength": 0.8, "scheduler": "euler_ancestral"}
    several = pictures(serving.generate(**BODY, **fields, seed=40, num_images=2))
    assert psnr(several[1], one(serving, **fields, seed=41)) >= 50


def test_previews_show_what_is_painted(serving: Serving) -> None:
    fields = {**BODY, **sent(picture(48, 32), ellipse(48, 32)), "preview_every": 2, "scheduler": "euler"}
    answer = serving.client.post("/generate", json=fields, headers={"Accept": "text/event-stream"})
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    shown = [data["previews"] for data in map(json.loads, lines) if data.get("previews")]
    assert len(shown) == 3


def test_a_form_gives_the_same_images_as_json(serving: Serving) -> None:
    original, mask = picture(48, 32), ellipse(48, 32)
    files = {"image": ("x.png", saved(original)), "mask": ("y.png", saved(mask))}
    form = serving.client.post(
        "/generate", data={name: str(value) for name, value in BODY.items()} | {"seed": "6"}, files=files
    )
    assert pictures(form)[0].tolist() == one(serving, **sent(original, mask), seed=6).tolist()


def test_openai_edits_take_the_mask(serving: Serving) -> None:
    original, mask = picture(48, 32), hole(48, 32)
    files = {"image": ("x.png", saved(original)), "mask": ("y.png", saved(mask))}
    fields = {"prompt": BODY["prompt"], "size": "48x32", "seed": "6", "response_format": "b64_json"}
    answer = serving.client.post("/v1/images/edits", data=fields, files=files)
    assert answer.status_code == 200, answer.text
    edited = PIL.Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    ours = pictures(serving.generate(prompt=BODY["prompt"], width=48, height=32, seed=6, **sent(original, mask)))[0]
    assert np.asarray(edited).tolist() == ours.tolist()


@pytest.mark.parametrize("fill", [0, 1])
def test_img2img_of_the_web_ui_inpaints(serving: Serving, fill: int) -> None:
    """What the mask does not cover stays, as with every model; the rest is what this one paints."""
    original, mask = picture(48, 32), ellipse(48, 32)
    body = {
        "init_images": [text_of(original)],
        "mask": text_of(mask),
        "inpainting_fill": fill,
        "inpaint_full_res": False,
        "mask_blur": 0,
        "prompt": BODY["prompt"],
        "steps": 4,
        "width": 48,
        "height": 32,
        "seed": 6,
    }
    answer = serving.client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 200, answer.text
    made = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).convert("RGB"))
    before, kept = np.asarray(original), np.asarray(mask) == 0
    assert made[kept].tolist() == before[kept].tolist()
    assert np.abs(made[~kept].astype(int) - before[~kept]).mean() > 5
    assert '"is_using_inpainting_conditioning": true' in answer.json()["info"]


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [("euler", 0.3), ("dpmpp_2m", 0.75), ("ddim", 1.0), ("euler_ancestral", None), ("heun", None)],
)
def test_xl_draws_what_diffusers_draws(
    xl_serving: Serving, xl_reference: Any, scheduler: str, strength: float | None
) -> None:
    """Also by its default strength, which takes a step less than 1."""
    original, mask = picture(48, 32), ellipse(77, 99)
    own = {} if strength is None else {"strength": strength}
    answer = xl_serving.generate(**BODY, **sent(original, mask), **own, scheduler=scheduler, seed=5)
    assert answer.json()["parameters"]["strength"] == (0.9999 if strength is None else strength)
    theirs = draw(xl_reference, scheduler=scheduler, seed=5, image=original, mask_image=mask, **BODY, **own)
    assert theirs.std() > 5, "the reference is a flat picture: it proves nothing"
    assert psnr(pictures(answer)[0], theirs) >= 45


def test_xl_in_a_crowd_has_the_pictures_that_it_has_alone(xl_serving: HeldServing) -> None:
    bodies = crowd()[:6]
    alone = [pictures(xl_serving.generate(**body)) for body in bodies]
    answers = xl_serving.together(*(partial(xl_serving.generate, **body) for body in bodies))
    together = [pictures(answer) for answer in answers]
    assert min(psnr(*pair) for pairs in zip(alone, together, strict=True) for pair in zip(*pairs, strict=True)) >= 50
