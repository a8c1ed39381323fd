"""Effects of the prompt on the image: weights, length, skipped layers, and guidance intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.accuracy import psnr
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures
from tests.support.tiny import TOKENS

BODY: dict[str, Any] = {"num_inference_steps": 8, "width": 32, "height": 32, "seed": 6}
LONG = "a red cat on a blue hill in the rain at night, a green bird on two old boats, a red hill"  # two chunks


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


def embed(pipeline: Any, *chunks: list[tuple[str, float]], repeat: int = 1) -> torch.Tensor:
    """The embeddings [1, repeat · chunks · TOKENS, D] of chunks of weighted texts."""
    embedded = []
    for texts in chunks:
        ids, weights = [pipeline.tokenizer.bos_token_id], [1.0]
        for text, weight in texts:
            made = pipeline.tokenizer(text, add_special_tokens=False).input_ids
            ids += made
            weights += [weight] * len(made)
        rest = TOKENS - len(ids)
        assert rest > 0
        ids += [pipeline.tokenizer.eos_token_id] + [pipeline.tokenizer.pad_token_id] * (rest - 1)
        with torch.inference_mode():
            plain = pipeline.text_encoder(torch.tensor([ids]))[0]
        weighted = plain * torch.tensor([weights + [1.0] * rest])[..., None]
        embedded.append(weighted * plain.mean() / weighted.mean())
    return torch.cat(embedded * repeat, dim=1)


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a (red:1.3) cat", [("a", 1.0), ("red", 1.3), ("cat", 1.0)]),
        ("a ((red)) [cat]", [("a", 1.0), ("red", 1.21), ("cat", 1 / 1.1)]),
        (r"a \(red\) cat", [("a (red) cat", 1.0)]),
    ],
)
def test_weights(serving: Serving, reference: Any, prompt: str, spans: list[tuple[str, float]]) -> None:
    body = {**BODY, "scheduler": "dpmpp_2m", "guidance_scale": 6.0}
    ours = pictures(serving.generate(prompt=prompt, negative_prompt="(rain:0.7)", **body))[0]
    output: dict[str, Any] = {
        "prompt_embeds": embed(reference, spans),
        "negative_prompt_embeds": embed(reference, [("rain", 0.7)]),
    }
    assert psnr(ours, draw(reference, **output, **body)) >= 45
    plain = pictures(serving.generate(prompt="a red cat", negative_prompt="rain", **body))[0]
    assert psnr(ours, plain) < 45, "the weights change nothing: this proves nothing"


def test_plain_syntax_matches_diffusers(serving: Serving, reference: Any) -> None:
    body = {**BODY, "prompt": "a (red) [cat]", "scheduler": "euler", "guidance_scale": 6.0}
    ours = pictures(serving.generate(prompt_syntax="plain", **body))[0]
    assert psnr(ours, draw(reference, **body)) >= 45
    assert psnr(ours, pictures(serving.generate(**body))[0]) < 45


def test_a_long_prompt_is_encoded_to_its_end(serving: Serving, reference: Any) -> None:
    body = {**BODY, "scheduler": "ddim"}
    first, _, second = LONG.partition(", ")
    output: dict[str, Any] = {
        "prompt_embeds": embed(reference, [(f"{first},", 1.0)], [(second, 1.0)]),
        "negative_prompt_embeds": embed(reference, [("rain", 1.0)], repeat=2),
    }
    for scale, negative in ((1.0, ""), (6.0, "rain")):
        answer = serving.generate(prompt=LONG, negative_prompt=negative, guidance_scale=scale, **body)
        assert answer.json()["warnings"] == []
        assert psnr(pictures(answer)[0], draw(reference, guidance_scale=scale, **output, **body)) >= 45


def test_break_ends_a_chunk(serving: Serving, reference: Any) -> None:
    body = {**BODY, "scheduler": "ddim", "guidance_scale": 1.0}
    ours = pictures(serving.generate(prompt="a red cat BREAK a blue hill BREAK rain", **body))[0]
    chunks = [[("a red cat", 1.0)], [("a blue hill", 1.0)], [("rain", 1.0)]]
    assert psnr(ours, draw(reference, prompt_embeds=embed(reference, *chunks), **body)) >= 45


def test_truncation_is_reported(serving: Serving) -> None:
    answer = serving.generate(prompt="a red cat " * 100, negative_prompt="[rain|night]", **BODY)
    warnings = answer.json()["warnings"]
    assert any(text.startswith("prompt: ") and "do not fit" in text for text in warnings)
    assert any(text.startswith("negative_prompt: ") for text in warnings)
    headers = {"Accept": "image/png"}
    bare = serving.client.post("/generate", json={"prompt": "ünì [rain|naïve]", **BODY}, headers=headers).headers
    assert "naïve" in json.loads(bare["X-Warnings"])[0]


def test_clip_skip(serving: Serving, reference: Any) -> None:
    """Of the prompt alone: diffusers reads the negative prompt by all layers."""
    body = {**BODY, "prompt": "a red cat", "scheduler": "ddim", "clip_skip": 1}
    ours = pictures(serving.generate(**body))[0]
    assert psnr(ours, draw(reference, **body)) >= 45
    assert psnr(ours, pictures(serving.generate(**{**body, "clip_skip": 0}))[0]) < 45
    refused = serving.generate(**{**body, "clip_skip": 2})
    assert refused.status_code == 422
    assert "skip at most 1" in refused.json()["detail"]


@pytest.mark.parametrize("end", [0.5, 0.3])
def test_guidance_may_end_early(serving: Serving, reference: Any, end: float) -> None:
    """And what comes then costs one row."""
    body = {**BODY, "prompt": "a red cat", "negative_prompt": "rain", "scheduler": "dpmpp_2m", "guidance_scale": 8.0}
    steps = BODY["num_inference_steps"]

    def stop(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) / steps < end or not pipeline.do_classifier_free_guidance:
            return tensors
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    theirs = draw(
        reference,
        callback_on_step_end=stop,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **body,
    )
    before = serving.metrics()
    ours = pictures(serving.generate(guidance_end=end, **body))[0]
    after = serving.metrics()
    assert psnr(ours, theirs) >= 45
    rows = after["latentd_step_rows_sum"] - before["latentd_step_rows_sum"]
    assert rows == steps + np.ceil(end * steps)
    assert psnr(ours, pictures(serving.generate(**body))[0]) < 45


def test_guidance_may_begin_late(serving: Serving) -> None:
    """Before, the picture is that of no guidance; an interval that holds no step is no guidance at all."""
    body = {**BODY, "prompt": "a red cat", "negative_prompt": "rain", "guidance_scale": 8.0}
    late = pictures(serving.generate(guidance_start=0.99, **body))[0]
    never = pictures(serving.generate(**{**body, "guidance_scale": 1.0}))[0]
    assert psnr(late, never) >= 50
    assert serving.generate(guidance_start=0.5, guidance_end=0.5, **body).status_code == 422


def test_guidance_rescale_is_rejected(serving: Serving) -> None:
    refused = serving.generate(prompt="a red cat", guidance_rescale=0.7)
    assert refused.status_code == 422
    assert "guidance_rescale is not supported" in refused.json()["detail"]
    assert serving.generate(prompt="a red cat", guidance_rescale=0.0, num_inference_steps=1).status_code == 200


def test_embeddings_are_cached_for_later_requests(serving: Serving) -> None:
    def lookups(result: str) -> float:
        return serving.metrics()[f'latentd_prompt_lookups_total{{result="{result}"}}']

    before = lookups("hit"), lookups("miss")
    for _ in range(3):
        assert serving.generate(prompt="two red birds", num_inference_steps=1).status_code == 200
    hits, misses = lookups("hit") - before[0], lookups("miss") - before[1]
    guided = 2  # prompts of a guided request
    assert hits + misses == 3 * guided
    assert misses <= guided
