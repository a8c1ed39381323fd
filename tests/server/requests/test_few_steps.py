"""Requests of models that are distilled to few steps: their defaults, and one step as a whole request."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image
import pytest

from engines.backends.registry import open_device
from engines.manifest import Defaults, Manifest, NoiseSchedule
from engines.schedulers import METHODS, Step, find, table
from server.requests.errors import InvalidRequest
from server.requests.intake import Intake
from server.requests.request import Request
from server.requests.schemas import GenerateRequest, Parameters
from server.requests.tokenizer import PromptTokenizer
from tests import ROOT
from tests.support.executing import Asked, Running

DEMO = ROOT / "engines" / "demo"
TURBO = Defaults(scheduler="euler", num_inference_steps=1, guidance_scale=0.0, timestep_spacing="trailing")
HYPER = Defaults(scheduler="tcd", num_inference_steps=1, guidance_scale=0.0, eta=1.0)
FIXED = Defaults(scheduler="lcm", num_inference_steps=1, guidance_scale=0.0, timesteps=(800,))


def asked(defaults: Defaults, **fields: Any) -> Request:
    manifest = Manifest.read(DEMO)
    tokenizer = PromptTokenizer(
        DEMO / manifest.tokenizer.file.path, tokens=manifest.context.tokens, pad=manifest.tokenizer.pad
    )
    intake = Intake(manifest.model_copy(update={"defaults": defaults}), tokenizer)
    return intake.request(GenerateRequest(prompt="a red heart", **fields))


def steps_of(request: Request) -> tuple[Step, ...]:
    return request.table.steps


def test_turbo_takes_one_unguided_step_from_the_last_timestep() -> None:
    request = asked(TURBO)
    assert [step.timestep for step in steps_of(request)] == [999]
    assert (request.rows, request.guided, request.depths) == (1, (False,), ("full",))
    assert request.params.warnings == []


def test_what_a_request_names_replaces_its_default() -> None:
    assert [step.timestep for step in steps_of(asked(TURBO, timestep_spacing="leading", num_inference_steps=2))] == [
        501.0,
        1.0,
    ]
    assert asked(HYPER, eta=0.0, num_inference_steps=4).params.scheduler.eta == 0.0
    assert asked(HYPER, num_inference_steps=4).params.scheduler.eta == 1.0
    assert [step.timestep for step in steps_of(asked(FIXED))] == [800]
    assert [step.timestep for step in steps_of(asked(FIXED, num_inference_steps=2))] == [999, 499]


@pytest.mark.parametrize("defaults", [TURBO, HYPER, FIXED])
def test_the_parameters_of_an_answer_give_the_same_steps(defaults: Defaults) -> None:
    first = asked(defaults, seed=1)
    again = Parameters.of(first.params).model_dump(exclude={"model", "strength", "prompt"})
    assert asked(defaults, **again).table is first.table


def test_a_negative_prompt_without_guidance_is_told_to_be_unused() -> None:
    (warning,) = asked(TURBO, negative_prompt="rain").params.warnings
    assert warning.startswith("negative_prompt: It is not used without guidance")
    assert asked(TURBO, negative_prompt="rain", guidance_scale=1.0).rows == 1
    assert asked(TURBO, negative_prompt="rain", guidance_scale=1.1).params.warnings == []


def picture() -> bytes:
    image = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "red").save(image, "png")
    return image.getvalue()


def test_an_image_takes_as_many_steps_as_its_strength_says() -> None:
    assert len(steps_of(asked(TURBO, image=picture(), num_inference_steps=2, strength=0.5))) == 1
    assert len(steps_of(asked(TURBO, image=picture(), strength=1.0))) == 1
    with pytest.raises(InvalidRequest, match="1 steps at this strength give no denoising step: increase"):
        asked(TURBO, image=picture())


def test_more_steps_than_a_model_was_distilled_on_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="51 steps: tcd takes 1 to 50") as refused:
        asked(HYPER, num_inference_steps=51)
    assert [error.field for error in refused.value.fields] == ["num_inference_steps"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_one_step(name: str) -> None:
    (step,) = table(find(name), 1, NoiseSchedule(steps_offset=1)).steps
    assert step.timestep >= 0


@pytest.fixture(scope="module")
def running() -> Any:
    with Running(DEMO, lambda: open_device("onnxruntime", threads=1)) as running:
        yield running


def test_one_step_has_previews_and_reuses_nothing(running: Running) -> None:
    one = running.ask(num_inference_steps=1, guidance_scale=1.0, preview_every=1, cache="fast", scheduler="euler")
    assert len(one.images()) == 1
    assert one.steps == [1]
    assert running.device.launches["denoise_shallow"] == 0


def test_four_steps_with_the_fast_cache_are_those_without(running: Running) -> None:
    plain, fast = (running.ask(num_inference_steps=4, seed=3, cache=cache).images()[0] for cache in ("off", "fast"))
    assert (plain == fast).all()
    assert (running.ask(num_inference_steps=5, seed=3, cache="fast").images()[0] != plain).any()
    assert running.device.launches["denoise_shallow"] > 0


def test_images_of_one_step_share_it(running: Running) -> None:
    before = running.metric("latentd_steps_total")
    fields: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0.0, "scheduler": "euler"}
    running.ask(**fields, num_images=4).images()
    assert running.metric("latentd_steps_total") == before + 1


def test_a_request_of_one_step_can_be_cancelled(running: Running) -> None:

    one = Asked()
    request = running.request(one, num_inference_steps=1)
    request.cancel()
    running.batcher.submit(request)
    assert one.outcome_name() == "Cancelled"
