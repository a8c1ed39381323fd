"""Where full steps are placed."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.manifest import FeatureDrift, NoiseSchedule
from engines.schedulers import NAMES, Scheduler, Table, find, table
from engines.step_cache import DEMO_DRIFT, extrapolates, full_steps, is_sensitive

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
@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "dpmpp_3m", "heun", "lms", "pndm", "unipc"])
def test_no_other_placement_errs_less(name: str, drift: FeatureDrift) -> None:
    """Every placement is tried, with the error of each as the module's docstring has it."""
    calls = made(name, 8)
    for count in (1, 2, 3, 5):
        best = min(error(calls, (0, *others), drift) for others in combinations(range(1, len(calls.steps)), count - 1))
        assert error(calls, full_steps(calls, count, drift), drift) == pytest.approx(best, abs=1e-12)


def error(calls: Table, placed: tuple[int, ...], drift: FeatureDrift) -> float:
    total = 0.0
    for full, end in pairwise((*placed, len(calls.steps))):
        for step in range(full + 1, end):
            moved = moves_of(calls, step) * (drift_at(calls, step, drift) - drift_at(calls, full, drift))
            total += float(np.square(moved).sum())
    return total


def moves_of(calls: Table, call: int) -> NDArray[np.float64]:
    """What one more in the output of a call moves x by in each step, relative to a latent's deviation there: [n]."""
    found, memory = np.zeros(len(calls.steps)), np.zeros(3)
    for step in range(call, len(calls.steps)):
        matrix = calls.steps[step].matrix
        terms = np.array([0, step == call, 0, *memory])
        x, *memory, _ = matrix @ terms
        last = step == len(calls.steps) - 1
        found[step] = 3 * x if last else x / np.hypot(*calls.steps[step + 1].level)
    return found


def drift_at(calls: Table, step: int, drift: FeatureDrift) -> float:
    """For levels within those that were measured, or beyond at the same slope."""
    signal, noise = calls.steps[step].level
    at, x, y = 2 * np.log(signal / noise), drift.log_snr, drift.total
    if at < x[0]:
        return float(y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0]))
    if at > x[-1]:
        return float(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))
    return float(np.interp(at, x, y))


def test_full_steps_are_dense_where_features_drift() -> None:
    calls = made("ddim", 50)
    drift = FeatureDrift(log_snr=(-10, 1, 2, 10), total=(0, 0.1, 1.1, 1.2))
    placed = full_steps(calls, 10, drift)
    levels = [2 * np.log(np.divide(*calls.steps[step].level)) for step in placed[1:]]
    assert (
        sum(1 <= level <= 2 for level in levels)
        > sum(1 <= 2 * np.log(np.divide(*s.level)) <= 2 for s in calls.steps) / 2
    )


def test_a_first_step_of_nothing_but_noise_is_no_obstacle() -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    calls = table(Scheduler("ddim"), 20, schedule)
    assert calls.steps[0].level[0] == 0
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
