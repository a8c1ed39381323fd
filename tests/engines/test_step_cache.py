"""Where full steps are placed."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.manifest import FeatureDrift, NoiseSchedule
from engines.schedulers import NAMES, Scheduler, Step, Table, find, table
from engines.step_cache import DEMO_DRIFT, extrapolates, full_steps, is_sensitive, step_size

EVEN = FeatureDrift(log_snr=(-10, 10), total=(0, 1))


def made(name: str, steps: int = 20) -> Table:
    return table(find(name), steps, NoiseSchedule())


@pytest.mark.parametrize("name", NAMES)
def test_any_number_is_placed_in_any_table(name: str) -> None:
    for steps in (1, 7, 20):
        if steps == 1 and name.startswith("lms"):
            continue
        calls = made(name, steps)
        for count in range(1, len(calls.steps) + 1):
            placed = full_steps(calls, count, DEMO_DRIFT)
            assert placed[0] == 0
            assert len(set(placed)) == count
            assert list(placed) == sorted(placed)
            assert placed[-1] < len(calls.steps)


@pytest.mark.parametrize("drift", [EVEN, DEMO_DRIFT])
@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "dpmpp_3m", "heun", "kdpm2", "lms", "lms_beta", "pndm", "unipc"])
def test_no_other_placement_errs_less(name: str, drift: FeatureDrift) -> None:
    """Every placement is tried, with the error of each as the module's docstring has it."""
    calls = made(name, 8)
    for count in (1, 2, 3, 5):
        tried = ((0, *others) for others in combinations(range(1, len(calls.steps)), count - 1))
        best = min(error(calls, one, drift) for one in tried if count == 1 or has_first_of_late_calls(calls, one))
        assert error(calls, full_steps(calls, count, drift), drift) == pytest.approx(best, abs=1e-12)


def error(calls: Table, placed: tuple[int, ...], drift: FeatureDrift) -> float:
    total = 0.0
    for full, end in pairwise((*placed, len(calls.steps))):
        for step in range(full + 1, end):
            moved = moves_of(calls, step) * (drift_at(calls, step, drift) - drift_at(calls, full, drift))
            total += float(np.square(moved).sum())
    return total


def has_first_of_late_calls(calls: Table, placed: tuple[int, ...]) -> bool:
    """Whether the first of the calls with little noise is full, if there are several."""
    late = [call for call, step in enumerate(calls.steps) if 2 * np.log(1 / sigma_of(step)) >= 2.9]
    return len(late) < 2 or late[0] in placed


def sigma_of(step: Step) -> float:
    """The noise, relative to the signal, of x as the UNet sees it; `scale` is that of diffusers' scale_model_input."""
    signal, noise = step.level
    return float(np.sqrt(1 / step.scale**2 - 1)) if signal == 1 else noise / signal


def moves_of(calls: Table, call: int) -> NDArray[np.float64]:
    """What one more in the output of a call moves x by in each step, relative to a latent's deviation there: [n]."""
    found, memory = np.zeros(len(calls.steps)), np.zeros(3)
    for step in range(call, len(calls.steps)):
        matrix = calls.steps[step].matrix
        terms = np.array([0, step == call, 0, *memory])
        x, *memory, _ = matrix @ terms
        last = step == len(calls.steps) - 1
        found[step] = 3 * x if last else x * calls.steps[step + 1].scale
    return found


def drift_at(calls: Table, step: int, drift: FeatureDrift) -> float:
    """For levels within those that were measured, or beyond at the same slope."""
    at, x, y = -2 * np.log(sigma_of(calls.steps[step])), drift.log_snr, drift.total
    if at < x[0]:
        return float(y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0]))
    if at > x[-1]:
        return float(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))
    return float(np.interp(at, x, y))


def test_full_steps_are_dense_where_features_drift() -> None:
    calls = made("ddim", 50)
    drift = FeatureDrift(log_snr=(-10, 1, 2, 10), total=(0, 0.1, 1.1, 1.2))
    placed = full_steps(calls, 10, drift)
    in_between = (calls.log_snr >= 1) & (calls.log_snr <= 2)
    assert in_between[list(placed[1:])].sum() > in_between.sum() / 2


def test_a_first_step_of_nothing_but_noise_is_no_obstacle() -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    calls = table(Scheduler("ddim"), 20, schedule)
    assert calls.steps[0].level[0] == 0
    assert calls.log_snr[0] == -15
    assert len(full_steps(calls, 6, DEMO_DRIFT)) == 6


@pytest.mark.parametrize("count", [0, 21])
def test_a_number_that_does_not_fit_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="of 20: choose 1 to 20"):
        full_steps(made("ddim"), count, DEMO_DRIFT)


def test_they_are_even_where_each_step_has_fresh_noise() -> None:
    assert full_steps(made("euler_ancestral"), 7, DEMO_DRIFT) == (0, 3, 6, 9, 12, 15, 18)
    assert full_steps(made("euler_ancestral"), 5, DEMO_DRIFT) == (0, 4, 8, 12, 16)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2m_sde_karras", "deis"])
def test_the_last_ones_are_full_where_differences_of_outputs_are_multiplied(name: str) -> None:
    calls = made(name)
    assert extrapolates(calls)
    for count in range(4, 20):
        assert full_steps(calls, count, DEMO_DRIFT)[-3:] == (17, 18, 19)
    assert full_steps(made("dpmpp_3m_sde"), 10, DEMO_DRIFT) == (0, 3, 5, 8, 10, 13, 15, 17, 18, 19)


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "euler",
        "heun",
        "lms",
        "lms_karras",
        "lms_exponential",
        "dpmpp_2m",
        "dpmpp_3m",
        "unipc",
        "euler_ancestral",
    ],
)
def test_elsewhere_they_are_not(name: str) -> None:
    assert not extrapolates(made(name))


def test_solvers_that_lean_on_earlier_outputs_are_sensitive() -> None:
    found = {
        name for name in ("deis", "lms", "unipc", "ddim", "euler", "dpmpp_2m", "dpmpp_3m") if is_sensitive(made(name))
    }
    assert found == {"deis", "lms", "unipc"}


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_3m", "deis", "unipc", "lms", "euler", "heun"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_calls_with_little_noise_reuse_no_features_of_noisier_ones(method: str, sigmas: str, steps: int) -> None:
    """With those of log SNR 2.6, of one image in fifteen the background changed its colour."""
    calls = made(f"{method}_{sigmas}", steps)
    late = int((calls.log_snr < 2.9).sum())
    for count in range(2, len(calls.steps) + 1):
        assert late in full_steps(calls, count, DEMO_DRIFT)


def test_steps_are_as_large_as_noise_falls_fast() -> None:
    sizes = [step_size(made(name, steps)) for name, steps in (("ddim", 20), ("ddim", 10), ("dpmpp_2m_karras", 10))]
    assert sizes == pytest.approx([0.40, 0.76, 1.30], abs=0.03)
    assert step_size(made("ddim", 1)) == 0
