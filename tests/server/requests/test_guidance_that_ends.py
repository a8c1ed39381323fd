"""Guidance that ends by itself: when it does, what that costs, and that the images are those of diffusers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engines.accuracy import psnr
from engines.contract import LANES
from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.params import GenerationParams
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from tests.support.meeting import HeldServing
from tests.support.references import draw, load_pipeline
from tests.support.serving import pictures

NOTHING = Prompt("", ())
STEPS = 12
BODY: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": STEPS, "scheduler": "euler"}
AGREED = 0.3  # of latents, as the documents say
LAG = 2  # steps


def request(*, images: int = 1, start: float = 0.0, scale: float = 7.5) -> Request:
    size, method = Size(width=64, height=64), Scheduler("ddim")
    params = GenerationParams(
        *(NOTHING, NOTHING, size, method, STEPS, scale, tuple(range(images))), guidance_start=start, guidance_end="auto"
    )
    return Request(params, table(method, STEPS, NoiseSchedule()), (), "a")


def effect(asked: Request, step: int, *, of_agreed: float) -> float:
    """What guidance adds to the model's output if that is so much of what may be left out of the image."""
    return of_agreed * AGREED / abs(float(asked.table.steps[step].matrix[LANES - 1, 1]))


def advance(asked: Request, steps: int) -> None:
    for _ in range(steps):
        asked.advance()


def test_it_ends_two_steps_after_it_was_seen_to_add_little() -> None:
    asked = request()
    advance(asked, 4)
    asked.observe_guidance(3, [effect(asked, 3, of_agreed=1.01)])
    assert asked.will_be_guided(0)
    advance(asked, 1)
    asked.observe_guidance(4, [effect(asked, 4, of_agreed=0.99)])
    assert (asked.step, asked.rows, asked.is_guided(0)) == (5, 2, True)
    advance(asked, 1)
    assert (asked.rows, asked.is_guided(0), asked.will_be_guided(0)) == (1, False, False)


def test_a_step_in_flight_changes_nothing() -> None:
    """Whether the result is read before or after the next step is launched."""
    early, late = request(), request()
    advance(early, 4)
    advance(late, 5)
    for asked in (early, late):
        asked.observe_guidance(3, [0.0])
    advance(early, 1)
    assert (early.step, early.rows) == (late.step, late.rows) == (5, 1)


def test_each_image_of_a_request_has_an_end_of_its_own() -> None:
    asked = request(images=3)
    advance(asked, 4)
    asked.observe_guidance(3, [1e9, 0.0, math.nan])
    advance(asked, 1)
    assert [asked.is_guided(image) for image in range(3)] == [True, False, True]
    assert asked.rows == 5


def test_steps_before_guidance_say_nothing_of_it() -> None:
    asked = request(start=0.5)
    advance(asked, 2)
    asked.observe_guidance(1, [0.0])
    advance(asked, 4)
    assert asked.is_guided(0)


def test_without_guidance_there_is_nothing_to_end() -> None:
    assert not request(scale=1.0).params.ends_guidance


def rows_of(serving: HeldServing, **body: Any) -> tuple[Any, float]:
    """The picture, and how many UNet rows its steps had."""
    before = serving.metrics()["latentd_step_rows_sum"]
    drawn = pictures(serving.generate(**body))[0]
    return drawn, serving.metrics()["latentd_step_rows_sum"] - before


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return load_pipeline(checkpoint)


class Watched:
    """Diffusers' pipeline, whose guidance ends as ours by its own numbers."""

    def __init__(self, pipeline: Any, scale: float) -> None:
        self._pipeline, self._scale = pipeline, scale
        self.effects: list[float] = []  # by step, on the image

    def draw(self, **body: Any) -> Any:
        hook = self._pipeline.unet.register_forward_hook(self._see)
        try:
            return draw(
                self._pipeline,
                guidance_scale=self._scale,
                callback_on_step_end=self._end,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
                **body,
            )
        finally:
            hook.remove()

    def _see(self, _unet: Any, _given: Any, output: Any) -> None:
        rows = output[0] if isinstance(output, tuple) else output.sample
        if len(rows) == 2:
            negative, positive = rows
            added = (self._scale - 1) * (positive - negative)
            scheduler = self._pipeline.scheduler
            self.effects.append(float(added.square().mean().sqrt() * scheduler.sigmas[scheduler.step_index or 0]))

    @property
    def ends(self) -> int:
        """The first unguided step."""
        ends = next((step + LAG for step, one in enumerate(self.effects) if one < AGREED), STEPS)
        return min(ends, STEPS)

    def _end(self, pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step + 1 < self.ends or not pipeline.do_classifier_free_guidance:
            return tensors
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}


@pytest.mark.parametrize("prompt", ["a red cat", "two old boats"])
def test_the_images_and_the_end_are_those_by_diffusers_numbers(
    serving: HeldServing, reference: Any, prompt: str
) -> None:
    body = {**BODY, "prompt": prompt, "negative_prompt": "rain", "seed": 6}
    for scale in (4.0, 12.0, 30.0):
        watched = Watched(reference, scale)
        theirs = watched.draw(**body)
        ours, rows = rows_of(serving, **body, guidance_scale=scale, guidance_end="auto")
        assert rows == STEPS + watched.ends, (scale, watched.effects)
        assert psnr(ours, theirs) >= 45


def test_a_crowd_changes_no_image(serving: HeldServing) -> None:
    """Rows that are dropped are those of other requests in the very next steps."""
    wishes = [
        {**BODY, "prompt": "a red cat", "seed": seed, "guidance_scale": 3.0 + 4 * seed, "num_images": 1 + seed % 3}
        for seed in range(9)
    ]
    for wish, cache in zip(wishes, ("off", "fast", "faster") * 3, strict=True):
        wish |= {"cache": cache, "guidance_end": "auto"}
    alone = [pictures(serving.generate(**wish)) for wish in wishes]
    crowded = serving.together(*(lambda wish=wish: pictures(serving.generate(**wish)) for wish in wishes))
    for one, other in zip(alone, crowded, strict=True):
        assert min(psnr(a, b) for a, b in zip(one, other, strict=True)) >= 50


def test_faster_includes_it_and_the_answer_says_so(serving: HeldServing) -> None:
    body = {**BODY, "prompt": "a red cat", "guidance_scale": 5.0, "seed": 1}
    ends = {
        cache: serving.generate(**body, cache=cache).json()["parameters"]["guidance_end"]
        for cache in ("off", "fast", "faster")
    }
    assert ends == {"off": 1.0, "fast": 1.0, "faster": "auto"}
    kept = serving.generate(**body, cache="faster", guidance_end=1.0).json()["parameters"]["guidance_end"]
    assert kept == 1.0
    refused = serving.generate(**body, guidance_end="soon")
    assert refused.status_code == 422
