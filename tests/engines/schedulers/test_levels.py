"""Noise levels, against torch, scipy and diffusers."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import NoiseSchedule
from engines.schedulers import Sigmas
from engines.schedulers.levels import alpha_bar, beta_quantile, between, sigma_to_t, t_to_sigma, training_sigmas

SCHEDULES = [
    NoiseSchedule(),
    NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
    NoiseSchedule(num_train_timesteps=37, beta_end=0.2),
    NoiseSchedule(num_train_timesteps=100, trained_betas=tuple(np.linspace(0.001, 0.1, 100).tolist())),
]


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_quantile_of_beta_is_scipys(p: list[float]) -> None:
    ours, expected = beta_quantile(np.array(p)), scipy.stats.beta.ppf(p, 0.6, 0.6)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("a", [0.3, 0.5, 0.9, 1.0])
def test_it_is_so_for_other_shapes(a: float) -> None:
    p = np.linspace(0, 1, 101)
    np.testing.assert_allclose(beta_quantile(p, a=a), scipy.stats.beta.ppf(p, a, a), rtol=1e-10, atol=1e-15)


def test_the_ends_of_beta_are_the_ends() -> None:
    assert beta_quantile(np.array([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=0, rel=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_left_is_what_torch_has_left_to_the_last_bit(schedule: NoiseSchedule) -> None:
    theirs = DDIMScheduler.from_config(schedule.model_dump(exclude_none=True)).alphas_cumprod
    np.testing.assert_array_equal(alpha_bar(schedule, zero_snr=False), theirs.double().numpy())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_sigmas_are_torchs_to_a_bit(schedule: NoiseSchedule) -> None:
    """Their square root is not always the nearest float32."""
    theirs = EulerDiscreteScheduler.from_config(schedule.model_dump(exclude_none=True)).sigmas[:-1].flip(0)
    np.testing.assert_array_max_ulp(training_sigmas(schedule, zero_snr=False), theirs.numpy(), maxulp=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_leaves_nothing_at_the_end(schedule: NoiseSchedule) -> None:
    config = {**schedule.model_dump(exclude_none=True), "rescale_betas_zero_snr": True}
    ours, theirs = alpha_bar(schedule, zero_snr=True), DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    assert ours[-1] == theirs[-1] == 0
    # They take their difference from what is left at the end, in float32, of which the last steps are small.
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-3)
    np.testing.assert_allclose(ours[: len(ours) * 9 // 10], theirs[: len(ours) * 9 // 10], rtol=2e-5)
    darkest = EulerDiscreteScheduler.from_config(config).sigmas[0].item()
    assert training_sigmas(schedule, zero_snr=True)[-1] == pytest.approx(darkest, rel=1e-7)


@pytest.mark.parametrize("sigmas", get_args(Sigmas)[1:])
@pytest.mark.parametrize("n", [1, 2, 3, 60, 1000])
def test_levels_fall_from_one_end_to_the_other(sigmas: Sigmas, n: int) -> None:
    levels = between(14.6, 0.03, n, sigmas=sigmas)
    assert levels[0] == pytest.approx(14.6, rel=1e-12)
    assert levels[-1] == pytest.approx(14.6 if n == 1 else 0.03, rel=1e-12)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_timesteps_and_sigmas_lead_to_each_other(schedule: NoiseSchedule) -> None:
    train = training_sigmas(schedule, zero_snr=False)
    t = np.arange(len(train), dtype=np.float64)[::-1]
    np.testing.assert_allclose(sigma_to_t(t_to_sigma(t, train), train), t, atol=1e-3)


def test_torch_is_asked_for_the_same_rounding() -> None:
    """np.linspace and torch.linspace differ in float32, and betas are made by torch's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    left = np.cumprod((1 - betas).numpy(), dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(alpha_bar(NoiseSchedule(), zero_snr=False), left)
