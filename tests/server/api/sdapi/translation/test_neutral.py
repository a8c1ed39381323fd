"""Fields without a counterpart: accepted with a value that changes nothing, and refused with any other."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.sdapi.translation.neutral import check
from server.requests.errors import InvalidRequest

# What A1111's own page and common clients send with every request.
SENT: dict[str, Any] = {
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "denoising_strength": 0.7,
    "firstphase_width": 0,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": 0,
    "restore_faces": None,
    "tiling": False,
    "styles": [],
    "s_churn": 0.0,
    "s_tmax": None,
    "s_tmin": 0,
    "s_noise": 1.0,
    "refiner_checkpoint": None,
    "refiner_switch_at": 0.8,
    "disable_extra_networks": False,
    "comments": {},
    "script_name": None,
    "script_args": [],
    "alwayson_scripts": {},
    "save_images": False,
    "do_not_save_grid": True,
    "override_settings_restore_afterwards": True,
}


def test_what_clients_always_send_is_accepted_without_a_warning() -> None:
    assert check(SENT, {"sd_vae": "Automatic", "samples_format": "png", "sd_model_checkpoint": "x"}) == []


@pytest.mark.parametrize(
    ("extra", "settings", "field"),
    [
        ({"s_noise": 0.9}, {}, "s_noise"),
        ({"styles": ["photo"]}, {}, "styles"),
        ({"tiling": "yes"}, {}, "tiling"),
        ({"mask_round": False}, {}, "mask_round"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, {}, "alwayson_scripts.ADetailer"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}, {}]}}}, {}, "alwayson_scripts.ControlNet"),
        ({"alwayson_scripts": {"x": {"args": "on"}}}, {}, "alwayson_scripts.x"),
        ({"alwayson_scripts": ["x"]}, {}, "alwayson_scripts"),
        ({}, {"randn_source": "GPU"}, "override_settings.randn_source"),
        ({}, {"samples_format": "webp"}, "override_settings.samples_format"),
    ],
)
def test_what_would_change_the_image_is_named(extra: dict[str, Any], settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(extra, settings)
    assert [one.field for one in refused.value.fields] == [field]


def test_all_that_is_refused_is_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check({"tiling": True, "enable_hr": True}, {})
    assert {one.field for one in refused.value.fields} == {"enable_hr", "tiling"}


@pytest.mark.parametrize(
    "script",
    [
        None,
        {},
        [],
        {"args": []},
        {"args": [False, {"ad_model": "x"}]},
        {"args": [{"enabled": False}, {"enable": False}]},
    ],
)
def test_scripts_that_are_off(script: object) -> None:
    assert check({"alwayson_scripts": {"any": script}}, {}) == []


def test_what_is_unknown_is_ignored_with_a_warning() -> None:
    warnings = check({"step": 5, **{f"field{number}": 0 for number in range(20)}}, {"grid_save": False})
    assert len(warnings) == 10
    assert check({"step": 5}, {"grid_save": False}) == [
        "step: This field is unknown, and was ignored.",
        "override_settings.grid_save: This setting has no effect here.",
    ]
