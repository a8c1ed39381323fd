"""From a body to requests."""

from __future__ import annotations

from typing import Any

import pytest

from engines.demo import BUNDLE
from engines.manifest import Manifest
from server.api.sdapi.translation.plan import Plan, plan
from server.api.sdapi.translation.schemas import Txt2Img
from server.requests.depths import Cache
from server.requests.errors import InvalidRequest

MANIFEST = Manifest.read(BUNDLE)  # of 16 rows
MAX_SEED = 2**32 - 1


def plan_of(**fields: Any) -> Plan:
    return plan(Txt2Img.model_validate(fields), MANIFEST, model=MANIFEST.name)


def batches(**fields: Any) -> list[tuple[int | None, int]]:
    """The first seed and the number of images of each request."""
    return [(body.seed, body.num_images) for body in plan_of(**fields).bodies]


def test_an_empty_body_has_the_models_defaults() -> None:
    (body,) = plan_of().bodies
    assert (body.prompt, body.width, body.num_inference_steps, body.guidance_scale) == ("", None, None, None)
    assert (body.scheduler, body.sigmas, body.clip_skip, body.num_images) == (None, None, 0, 1)


def test_null_means_the_default() -> None:
    nothing = dict.fromkeys(Txt2Img.model_fields) | {"seed": 1}
    assert plan_of(**nothing).bodies == plan_of(seed=1).bodies


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_iter": 3}, [(5, 1), (6, 1), (7, 1)]),
        ({"batch_size": 4, "n_iter": 2}, [(5, 4), (9, 4)]),
        ({"batch_size": 10}, [(5, 8), (13, 2)]),
        ({"batch_size": 10, "cfg_scale": 1.0}, [(5, 10)]),
        ({"seed": MAX_SEED, "n_iter": 2}, [(MAX_SEED, 1), (0, 1)]),
    ],
)
def test_batches(fields: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert batches(**{"seed": 5} | fields) == expected


def test_a_random_seed_is_one_for_the_call() -> None:
    first, second = plan_of(n_iter=2).bodies
    assert first.seed is not None
    assert second.seed == (first.seed + 1) % (MAX_SEED + 1)
    assert plan_of().seed != plan_of().seed


@pytest.mark.parametrize("cache", [None, "off", "fast", "faster"])
def test_cache_is_an_extension_that_is_passed_on_or_left_to_the_server(cache: Cache | None) -> None:
    (body,) = plan_of(cache=cache).bodies
    assert body.cache == cache


@pytest.mark.parametrize(("stop_at", "skipped"), [(0, 0), (1, 0), (2, 1), (None, 0)])
def test_clip_skip_counts_from_one(stop_at: int | None, skipped: int) -> None:
    (body,) = plan_of(override_settings={"CLIP_stop_at_last_layers": stop_at}).bodies
    assert body.clip_skip == skipped


@pytest.mark.parametrize("stop_at", [True, -1, 65, 2.5, "2"])
def test_clip_skip_is_checked(stop_at: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_of(override_settings={"CLIP_stop_at_last_layers": stop_at})
    assert refused.value.fields[0].field == "override_settings.CLIP_stop_at_last_layers"


@pytest.mark.parametrize("name", [None, "", "latentd-demo", "Latentd-Demo [c3771bed8f]", "c3771bed8f"])
def test_the_served_checkpoint_by_its_names(name: str | None) -> None:
    assert plan_of(override_settings={"sd_model_checkpoint": name}).bodies


def test_whole_numbers_may_be_written_as_floats() -> None:
    assert plan_of(steps=20.0).bodies[0].num_inference_steps == 20


def test_parameters_repeat_the_request_without_what_was_ignored() -> None:
    fields = {"prompt": "a cat", "steps": 3, "override_settings": {"x": 1, "CLIP_stop_at_last_layers": 2}, "y": 2}
    parameters = plan_of(**fields).parameters
    assert (parameters["prompt"], parameters["steps"]) == ("a cat", 3)
    assert parameters["override_settings"] == {"CLIP_stop_at_last_layers": 2}
    assert "y" not in parameters
