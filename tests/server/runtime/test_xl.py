"""Stable Diffusion XL: a server draws what diffusers' pipelines draw, alone and in a crowd."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from engines.accuracy import psnr
from tests.support.meeting import HeldServing
from tests.support.parity import CASES, Drawing, Pipelines, crowd
from tests.support.references import draw
from tests.support.serving import Serving, pictures
from tests.support.tiny import TOKENS


@pytest.fixture(scope="module")
def pipelines(xl_checkpoint: Path) -> Pipelines:
    return Pipelines.load(xl_checkpoint)


def test_every_case_is_drawn_as_by_diffusers(xl_serving: Serving, pipelines: Pipelines) -> None:
    drawings = {name: Drawing.of(name, scheduler="dpmpp_2m", num_inference_steps=4) for name in CASES}
    drawn = {name: drawing.served_by(xl_serving) for name, drawing in drawings.items()}
    found = {name: drawings[name].decibels(ours, pipelines) for name, ours in drawn.items()}
    assert min(found.values()) >= 45, found
    for one, other in combinations(drawn, 2):
        assert psnr(drawn[one][0], drawn[other][0]) < 45, f"{one} and {other} are the same: this proves nothing"


def test_a_crowd_is_drawn_as_by_diffusers(xl_serving: HeldServing, pipelines: Pipelines) -> None:
    """Of every case at once, in two sizes, some of several images; some share no more than a step."""
    wishes, before = crowd(32), xl_serving.total("latentd_steps_total")
    crowded = xl_serving.together(*(partial(one.served_by, xl_serving) for one in wishes))
    calls = xl_serving.total("latentd_steps_total") - before
    assert calls < sum(one.fields["num_inference_steps"] for one in wishes), "they shared no step: this proves nothing"
    for wish, ours in zip(wishes, crowded, strict=True):
        assert wish.decibels(ours, pipelines) >= 45, str(wish)


def embed(pipeline: Any, *chunks: Sequence[tuple[str, float]]) -> dict[str, torch.Tensor]:
    """The embeddings [1, chunks · TOKENS, D] of chunks of weighted texts, and the pooled one [1, Z] of the first."""
    embedded, pooled = [], []
    encoders = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    for texts in chunks:
        parts = []
        for tokenizer, encoder in encoders:
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in texts:
                made = tokenizer(text, add_special_tokens=False).input_ids
                ids, weights = ids + made, weights + [weight] * len(made)
            rest = TOKENS - len(ids)
            ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (rest - 1)
            with torch.inference_mode():
                encoded = encoder(torch.tensor([ids]), output_hidden_states=True)
            plain = encoded.hidden_states[-2]
            weighted = plain * torch.tensor([weights + [1.0] * rest])[..., None]
            parts.append(weighted * plain.mean() / weighted.mean())
        embedded.append(torch.cat(parts, dim=2))
        pooled.append(encoded.text_embeds)
    return {"prompt_embeds": torch.cat(embedded, dim=1), "pooled_prompt_embeds": pooled[0]}


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a (red:1.3) cat", [[("a", 1.0), ("red", 1.3), ("cat", 1.0)]]),
        ("a red cat BREAK [rain]", [[("a red cat", 1.0)], [("rain", 1 / 1.1)]]),
        (
            "a red cat on a blue hill in the rain at night, a green bird on two old boats, a red hill",
            [
                [("a red cat on a blue hill in the rain at night,", 1.0)],
                [("a green bird on two old boats, a red hill", 1.0)],
            ],
        ),
    ],
)
def test_weights_and_chunks_act_on_both_encoders(
    xl_serving: Serving, pipelines: Pipelines, prompt: str, chunks: list[list[tuple[str, float]]]
) -> None:
    """Of several chunks the first one's pooled embedding is read."""
    fields: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 4, "seed": 6, "scheduler": "ddim"}
    ours = pictures(xl_serving.generate(prompt=prompt, negative_prompt="(rain:0.7)", guidance_scale=6.0, **fields))[0]
    negative = embed(pipelines.noise, *[[("rain", 0.7)]] * len(chunks))
    given = embed(pipelines.noise, *chunks) | {f"negative_{name}": value for name, value in negative.items()}
    assert psnr(ours, draw(pipelines.noise, **{**fields, **given, "guidance_scale": 6.0})) >= 45


def test_an_empty_negative_prompt_is_none_in_diffusers(xl_serving: Serving, pipelines: Pipelines) -> None:
    """And not the embeddings of an empty text, which it takes where one is given."""
    one = Drawing.of("no negative prompt", scheduler="euler", num_inference_steps=4)
    (ours,) = one.served_by(xl_serving)
    given = Drawing({**one.fields, "negative_prompt": ""})
    assert psnr(ours, one.drawn_by(pipelines)[0]) >= 45
    assert psnr(ours, given.drawn_by(pipelines)[0]) < 45


def test_skipped_layers_are_counted_from_the_last_but_one(xl_serving: Serving) -> None:
    refused = xl_serving.generate(prompt="a red cat", clip_skip=2)
    assert refused.status_code == 422
    assert "skip at most 1" in refused.json()["detail"]


def test_an_exact_picture_is_the_same_bytes_in_a_crowd(xl_serving: HeldServing) -> None:
    body = {**Drawing.of("other sizes", scheduler="euler", num_inference_steps=4).body, "exact": True}
    exact = Drawing(body)
    alone = exact.served_by(xl_serving)
    (crowded, *others) = xl_serving.together(*(partial(one.served_by, xl_serving) for one in (exact, *crowd(8))))
    assert all(others)
    assert np.array_equal(crowded, alone)


def test_the_step_cache_changes_little(xl_serving: HeldServing) -> None:
    one = Drawing.of("guided", scheduler="euler", num_inference_steps=12)
    (full,), (fast,) = one.served_by(xl_serving), pictures(xl_serving.generate(**one.body, cache="fast"))
    assert 20 < psnr(full, fast) < 99
    found = xl_serving.together(*[partial(xl_serving.generate, **one.body, cache="fast")] * 6)
    assert min(psnr(fast, pictures(other)[0]) for other in found) >= 50


def test_previews_come_with_the_steps(xl_serving: Serving) -> None:
    """A pixel per latent, by the matrix that the build fits to the model's own decoder."""
    one = Drawing.of("guided", scheduler="ddim", num_inference_steps=4)
    body = {**one.body, "preview_every": 3}
    with xl_serving.client.stream("POST", "/generate", json=body, headers={"Accept": "text/event-stream"}) as answer:
        events = [json.loads(line.removeprefix("data:")) for line in answer.iter_lines() if line.startswith("data:")]
    (file,) = [event["preview"] for event in events if event.get("preview")]
    shown = PIL.Image.open(io.BytesIO(base64.b64decode(file.partition(",")[2])))
    assert shown.size == (24, 16)
    assert np.asarray(shown).std() > 5


def test_the_kept_part_of_an_image_stays(xl_serving: Serving) -> None:
    """The usual blending: with another prompt, only the masked part changes."""
    one, other = (
        Drawing.of("mask", scheduler="euler", num_inference_steps=4, prompt=prompt).served_by(xl_serving)[0]
        for prompt in ("a red cat", "two old boats")
    )
    apart = np.abs(one - other).mean(axis=2)
    assert apart[:4].mean() < apart[12:20, 18:30].mean() / 2
