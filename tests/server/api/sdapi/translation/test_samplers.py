"""Names of samplers and schedulers."""

from __future__ import annotations

import pytest

from engines.schedulers import find
from server.api.sdapi.translation.samplers import Sampling, sampling, schedulers
from server.requests.errors import InvalidRequest


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        (None, None, Sampling()),
        ("", "", Sampling()),
        ("Automatic", "Automatic", Sampling()),
        ("DPM++ 2M Karras", None, Sampling("DPM++ 2M Karras")),
        ("DPM++ 2M", "Karras", Sampling("DPM++ 2M", "karras")),
        ("Euler", "exponential", Sampling("Euler", "exponential")),
        (None, "Beta", Sampling(None, "beta")),
        ("Euler", "Uniform", Sampling("Euler", timestep_spacing="linspace")),
    ],
)
def test_names(sampler: str | None, scheduler: str | None, expected: Sampling) -> None:
    assert sampling(sampler, scheduler, None) == expected


@pytest.mark.parametrize("name", ["SGM Uniform", "sgm_uniform", "SGMUniform"])
def test_a_schedule_that_is_nearly_the_same_has_a_warning(name: str) -> None:
    found = sampling("Euler", name, None)
    assert found.timestep_spacing == "trailing"
    assert "nearest" in found.warnings[0]


def test_every_label_is_a_name_too() -> None:
    for one in schedulers():
        assert sampling("Euler", one.label, None)[:3] == sampling("Euler", one.name, None)[:3]


@pytest.mark.parametrize("name", ["Polyexponential", "Align Your Steps", "KL Optimal", "default"])
def test_other_schedules_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="choose one of Automatic, Karras"):
        sampling("Euler", name, None)


@pytest.mark.parametrize(
    ("sampler", "eta", "expected"),
    [("DDIM", 1.0, 1.0), ("DDIM", 0.0, 0.0), ("Euler", 0.3, None), ("Euler a", 1.0, None), ("nothing", 0.3, None)],
)
def test_eta_is_for_samplers_that_have_one(sampler: str, eta: float, expected: float | None) -> None:
    assert sampling(sampler, None, eta).eta == expected


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE", "DPM2 a Karras"])
def test_an_eta_that_would_change_the_noise_is_refused(sampler: str) -> None:
    assert find(sampler)
    with pytest.raises(InvalidRequest) as refused:
        sampling(sampler, None, 0.0)
    assert refused.value.fields[0].field == "eta"
