"""The demo model that is shipped: its images show what the prompts ask for. All 200 prompts: engines.demo.check."""

from __future__ import annotations

import base64
import io
import json
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import StableDiffusionPipeline

from engines.demo import BUNDLE as DEMO
from engines.demo.pictures import check, concepts, draw_prompts
from engines.demo.restore import restore
from engines.manifest import Manifest
from tests.support.serving import Serving


def picture(demo: Serving, prompt: str, seed: int) -> bytes:
    """Generate an image with the defaults for everything but prompt and seed."""
    answer = demo.client.post("/generate", json={"prompt": prompt, "seed": seed}, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.content


def test_images_show_what_the_prompt_asks_for(demo: Serving) -> None:
    wanted = draw_prompts(12, seed=1)
    pictures = (picture(demo, prompt, seed) for seed, (prompt, _) in enumerate(wanted))
    seen = [check(PIL.Image.open(io.BytesIO(file))) for file in pictures]
    things = sum(one.thing == other.thing for one, (_, other) in zip(seen, wanted, strict=True))
    colors = sum(one.color == other.color for one, (_, other) in zip(seen, wanted, strict=True))
    assert things >= 11
    assert colors >= 11


def test_previews_resemble_the_image(demo: Serving) -> None:
    """In its colors and its orientation, at a quarter of the size."""
    body = {"prompt": "a red heart on a yellow background", "seed": 7, "preview_every": 19}
    with demo.client.stream("POST", "/generate", json=body, headers={"Accept": "text/event-stream"}) as answer:
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    (preview,) = (event["preview"] for event in events if event.get("preview"))
    shown, drawn = (
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2]))), np.float64)
        for text in (preview, events[-1]["images"][0]["image"])
    )
    pooled = drawn.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(shown.ravel(), pooled.ravel())[0, 1] > 0.8
    for other in (shown[::-1], shown.transpose(1, 0, 2), shown[..., ::-1]):
        assert np.corrcoef(other.ravel(), pooled.ravel())[0, 1] < np.corrcoef(shown.ravel(), pooled.ravel())[0, 1]


def test_the_same_seed_gives_the_same_bytes(demo: Serving) -> None:
    first, second = (picture(demo, "a red heart on a yellow background", 7) for _ in range(2))
    assert check(PIL.Image.open(io.BytesIO(first))) == ("red heart", "yellow")
    assert first == second


def test_unknown_words_give_an_image(demo: Serving) -> None:
    for prompt in ("", "ein rotes Herz auf gelbem Grund", "🍎 东京", "red " * 500):
        assert picture(demo, prompt, 1).startswith(b"\x89PNG")


def test_the_checkpoint_can_be_restored_from_the_bundle(tmp_path: Path) -> None:
    restore(DEMO, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            "a red heart on a yellow background",
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(7),
        )
    assert check(drawn.images[0]) == ("red heart", "yellow")


def test_the_bundle_fits_in_a_repository(demo: Serving) -> None:
    manifest = Manifest.load(DEMO)
    assert sum(file.size for file in manifest.files) < 40e6
    assert manifest.weights == "fp16"
    assert len(concepts().things) >= 96
    assert len(concepts().colors) == 10
    assert demo.client.get("/models").json()[0]["examples"] == list(manifest.examples)
