"""Each table against the diffusers class it stands for, stepped with the same model outputs and the same noise.

The class computes in float64 here, from the noise schedule that it has in float32, so that what is measured is our
formulas and not its roundings; one test below takes it as it is.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.limits import MAX_STEPS
from engines.manifest import NoiseSchedule
from engines.schedulers import METHODS, NAMES, FinalSigma, Scheduler, Spacing, find, table
from tests.support.references import CLASSES
from tests.support.stepping import SHAPE, Run, apart, noises, reference, run_diffusers, run_table

# diffusers makes arrays of tensors, and takes their logarithms by numpy, which torch answers the way numpy 1 asked.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]


def options(name: str) -> tuple[str, ...]:
    return METHODS[find(name).method].about.options


PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
REFUSED = [(name, "sample") for name in NAMES if "sample" not in METHODS[find(name).method].about.predictions]
ACCEPTED = [(name, kind) for name in NAMES for kind in PREDICTIONS if (name, kind) not in REFUSED]
DISTILLED = ("lcm", "tcd")  # they take 50 steps at most
WHOLE = ("ddim", "ddpm", "pndm", "lcm", "tcd", "dpmpp", "deis", "unipc")  # they round timesteps

SD1 = NoiseSchedule(steps_offset=1, set_alpha_to_one=False)
SCHEDULES = {
    "plain": NoiseSchedule(),
    "sd1": SD1,
    "sd2-v": SD1.model_copy(update={"prediction_type": "v_prediction"}),
    "alpha-one": NoiseSchedule(set_alpha_to_one=True),
    "sigma-min": NoiseSchedule(final_sigmas_type="sigma_min"),
    "trailing": NoiseSchedule(timestep_spacing="trailing"),
    "linear": NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
    "trained": NoiseSchedule(num_train_timesteps=100, trained_betas=tuple(np.linspace(0.001, 0.1, 100).tolist())),
    "400-training-timesteps": NoiseSchedule(num_train_timesteps=400, beta_end=0.03),
    "zero-snr": NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "zero-snr-trailing": NoiseSchedule(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
}


def finite(run: Run) -> bool:
    return all(np.isfinite(x).all() for x in run.xs)


def makes_a_step_to_spare(num_steps: int, total: int) -> bool:
    """Whether np.arange rounds so that diffusers finds one more trailing timestep, -1."""
    return len(np.arange(total, 0, -total / num_steps)) > num_steps


def makes_no_step(scheduler: Scheduler, num_steps: int, schedule: NoiseSchedule) -> bool:
    """Whether diffusers ends where it begins: where the first of the levels is the last too."""
    spaced = num_steps == 1 and scheduler.sigmas != "default"
    ends_low = scheduler.final_sigmas_type or schedule.final_sigmas_type
    return spaced and (scheduler.method == "deis" or (scheduler.method == "unipc" and ends_low == "sigma_min"))


def assert_same(ours: Run, theirs: Run, scheduler: Scheduler, schedule: NoiseSchedule) -> None:
    """Compare what both made, up to where diffusers' numbers end if they do."""
    good = len(theirs.xs) if finite(theirs) else [bool(np.isfinite(x).all()) for x in theirs.xs].index(False)
    assert finite(ours)
    assert len(ours.xs) == len(theirs.xs)
    assert ours.draws == theirs.draws
    assert ours.init_scale == pytest.approx(theirs.init_scale, rel=1e-6)
    np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-6)
    np.testing.assert_allclose(ours.levels, theirs.levels, rtol=1e-5, atol=1e-9)
    # Fractions are interpolated; where they are cut off, 999 up to rounding is 998 to diffusers, on some machines.
    off = np.abs(np.array(ours.timesteps) - theirs.timesteps)
    whole = scheduler.method.startswith(WHOLE)
    cut = scheduler.sigmas in ("exponential", "beta") or schedule.beta_schedule == "squaredcos_cap_v2"
    assert off[0] <= (float(cut) if whole else 5e-4)
    assert (off[1:] <= (0 if whole else 5e-4)).all()
    for mine, expected in zip(ours.xs[:good], theirs.xs[:good], strict=True):
        assert apart(mine, expected) < 1e-5
    for mine, expected in zip(ours.denoised[:good], theirs.denoised[:good], strict=bool(theirs.denoised)):
        assert apart(mine, expected) < 1e-5


def check(scheduler: Scheduler, num_steps: int, schedule: NoiseSchedule, *, skip: int = 0, seed: int = 0) -> None:
    """Hold our table to diffusers' class; where we refuse, diffusers must have nothing to show."""
    output: dict[str, Any] = {"skip": skip, "seed": seed}
    try:
        ours = run_table(scheduler, num_steps, schedule, **output)
    except ValueError:
        assert not finite(run_diffusers(scheduler, num_steps, schedule, **output))
        return
    assert_same(ours, run_diffusers(scheduler, num_steps, schedule, **output), scheduler, schedule)


@pytest.mark.parametrize(("name", "prediction"), ACCEPTED)
def test_a_table_does_what_diffusers_does(name: str, prediction: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction)
    for spacing in SPACINGS if "timestep_spacing" in options(name) else (None,):
        check(find(name, timestep_spacing=spacing), 8, schedule)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 30])
@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_few_or_many_steps_does_too(name: str, num_steps: int) -> None:
    if not makes_no_step(find(name), num_steps, SD1):
        check(find(name), num_steps, SD1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_a_table_follows_the_checkpoint(name: str, schedule: NoiseSchedule) -> None:
    check(find(name), 7, schedule)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", [name for name in NAMES if "final_sigmas_type" in options(name)])
def test_methods_of_higher_order_end_at_a_lower_one_below_15(name: str, final: FinalSigma) -> None:
    for num_steps in (14, 15):
        check(find(name, final_sigmas_type=final), num_steps, SD1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scheduler, int, NoiseSchedule, int, int]:
    name = draw(st.sampled_from(NAMES))
    asked: dict[str, Any] = {
        option: draw(values)
        for option, values in {
            "timestep_spacing": st.sampled_from([None, *SPACINGS]),
            "final_sigmas_type": st.sampled_from([None, "zero", "sigma_min"]),
            "eta": st.none() | st.floats(0, 1),
        }.items()
        if option in options(name)
    }
    scheduler = find(name, **asked)
    kinds = METHODS[scheduler.method].about.predictions
    schedule = draw(st.sampled_from(list(SCHEDULES.values()))).model_copy(
        update={"prediction_type": draw(st.sampled_from(kinds))}
    )
    num_steps = draw(st.integers(1, 50 if name in DISTILLED else 60))
    skip = draw(st.just(0) | st.integers(0, num_steps - 1))
    return scheduler, num_steps, schedule, skip, draw(st.integers(0, 2**32 - 1))


@settings(derandomize=True, deadline=None, database=None, max_examples=250)
@given(cases())
def test_any_table_does_what_diffusers_does(case: tuple[Scheduler, int, NoiseSchedule, int, int]) -> None:
    scheduler, num_steps, schedule, skip, seed = case
    trailing = (scheduler.timestep_spacing or schedule.timestep_spacing) == "trailing"
    if trailing and makes_a_step_to_spare(num_steps, schedule.num_train_timesteps):
        return
    if not makes_no_step(scheduler, num_steps, schedule):
        check(scheduler, num_steps, schedule, skip=skip, seed=seed)


@pytest.mark.parametrize("skip", [1, 2, 3, 9])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_skipped_is_what_diffusers_skips(name: str, skip: int) -> None:
    """Its pipelines that start from a picture leave out the first timesteps, and a history begins anew there."""
    check(find(name), 10, SD1, skip=skip)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_as_near_to_diffusers_as_its_float32_lets_it(name: str) -> None:
    """The class as it is. Where steps are short, as beta's are at the ends, float32 loses what their logs differ by."""
    theirs = run_diffusers(find(name), 50, SD1, double=False)
    bound = 2e-3 if name in ("dpmpp_3m_beta", "dpmpp_3m_sde_beta") else 1e-4
    for mine, expected in zip(run_table(find(name), 50, SD1).xs, theirs.xs, strict=True):
        assert apart(mine, expected) < bound


@pytest.mark.parametrize("num_steps", [61, 100, 133, MAX_STEPS])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in DISTILLED])
def test_long_tables_have_diffusers_timesteps(name: str, num_steps: int) -> None:
    scheduler = reference(find(name), SD1)
    scheduler.set_timesteps(num_steps)
    timesteps = [step.timestep for step in table(find(name), num_steps, SD1).steps]
    np.testing.assert_allclose(timesteps, scheduler.timesteps, rtol=0, atol=0 if name.startswith(WHOLE) else 5e-4)


@pytest.mark.parametrize("eta", np.linspace(0, 1, 21).tolist())
def test_tcd_leaps_as_far_as_diffusers(eta: float) -> None:
    """How far hangs on the last digit of (1 - eta) times the timestep."""
    check(find("tcd", eta=eta), 25, NoiseSchedule())


# --- where diffusers breaks


@pytest.mark.parametrize(("name", "prediction"), REFUSED)
def test_what_diffusers_refuses_is_refused(name: str, prediction: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction)
    with pytest.raises((ValueError, NotImplementedError)):
        run_diffusers(find(name), 4, schedule)
    method = find(name).method
    with pytest.raises(ValueError, match=f"{method} is not defined for models that predict the sample"):
        table(find(name), 4, schedule)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_past_the_last_training_timestep_are_refused(name: str) -> None:
    short = SD1.model_copy(update={"num_train_timesteps": 100})
    with pytest.raises(IndexError):
        run_diffusers(find(name), 100, short)
    with pytest.raises(ValueError, match="100 steps and steps_offset 1 overrun the training timesteps: ask for fewer"):
        table(find(name), 100, short)


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_models_take_no_more_steps_than_they_were_distilled_on(name: str) -> None:
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 51"):
        run_diffusers(find(name), 51, SD1)
    with pytest.raises(ValueError, match=f"51 steps: {name} takes 1 to 50"):
        table(find(name), 51, SD1)
    with pytest.raises(ValueError, match=f"{name} needs 50 training timesteps, and this model has 20"):
        table(find(name), 4, NoiseSchedule(num_train_timesteps=20))


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m_sde", "unipc", "deis"])
def test_timesteps_that_come_twice_are_refused(name: str, spacing: Spacing) -> None:
    scheduler, schedule = find(name, timestep_spacing=spacing), SCHEDULES["trained"]
    with np.errstate(all="ignore"):
        assert not finite(run_diffusers(scheduler, 100, schedule))
    with pytest.raises(ValueError, match=f"100 steps of {name} do not fit between the training timesteps"):
        table(scheduler, 100, schedule)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_noise_tells_nothing_of_a_picture_that_is_gone(name: str) -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    scheduler = find(name, timestep_spacing=None if name in DISTILLED else "trailing")
    assert not finite(run_diffusers(scheduler, 4, schedule))
    with pytest.raises(ValueError, match="a model that predicts the noise says nothing of it"):
        table(scheduler, 4, schedule)
    assert table(scheduler, 4, schedule, skip=1).steps, "where something is left of it, it does"


@pytest.mark.parametrize("name", ["dpmpp_3m_karras", "dpmpp_3m_exponential", "dpmpp_3m_sde_beta"])
def test_a_last_step_of_no_length_is_finite(name: str) -> None:
    """It goes from the smallest level to the smallest level, and diffusers divides by how far that is."""
    scheduler = find(name, final_sigmas_type="sigma_min")
    ours, theirs = run_table(scheduler, 20, SD1), run_diffusers(scheduler, 20, SD1, double=False)
    assert not np.isfinite(theirs.xs[-1]).any()
    assert apart(ours.xs[-1], ours.xs[-2]) < 1e-9


def test_eta_one_leaves_no_root_of_a_negative_number() -> None:
    schedule, scheduler = SCHEDULES["zero-snr-trailing"], find("ddim", eta=1.0)
    broken = [n for n in range(1, 30) if not finite(run_diffusers(scheduler, n, schedule))]
    assert broken, "diffusers has mended it: so may we"
    assert all(finite(run_table(scheduler, n, schedule)) for n in broken)


@pytest.mark.parametrize("name", ["deis_karras", "deis_beta", "unipc_exponential"])
def test_one_step_is_a_step(name: str) -> None:
    """diffusers ends it at the first of its levels, which is the last of one, and leaves the noise as it is."""
    schedule = NoiseSchedule(final_sigmas_type="sigma_min")
    theirs, noise = run_diffusers(find(name), 1, schedule), next(noises(0))
    assert apart(theirs.xs[0], noise) < 1e-9
    ours = run_table(find(name), 1, schedule)
    assert apart(ours.xs[0], ours.denoised[0]) < 0.1


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "euler", "heun", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_trailing_makes_no_step_to_spare(name: str) -> None:
    """np.arange's rounding gives diffusers a 62nd of 61 timesteps, -1; a table leaves its reference there."""
    scheduler = find(name, timestep_spacing="trailing")
    theirs = reference(scheduler, NoiseSchedule())
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    expected = [t for t in theirs.timesteps.tolist() if t >= 0]
    assert [step.timestep for step in table(scheduler, 61, NoiseSchedule()).steps] == expected


@pytest.mark.parametrize(
    "betas",
    [
        (0.1, 0.1, 1.0),
        (0.5,),
        (0.1, 1e-9, 0.1),
    ],
)
def test_a_noise_schedule_that_adds_none_is_refused(betas: tuple[float, ...]) -> None:
    schedule = NoiseSchedule(num_train_timesteps=len(betas), trained_betas=betas)
    for name in ("ddim", "euler_karras", "dpmpp_2m"):
        with pytest.raises(ValueError, match="does not add noise at every timestep: mend its betas"):
            table(find(name), 1, schedule)


# --- what a table is


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [0, 1])
def test_memory_is_written_before_it_is_read(name: str, skip: int) -> None:
    for num_steps in (2, 3, 4, 5, 20):
        clean, dirty = (run_table(find(name), num_steps, SD1, skip=skip, memory=memory) for memory in (0.0, 1e3))
        np.testing.assert_array_equal(clean.xs, dirty.xs)
        np.testing.assert_array_equal(clean.denoised, dirty.denoised)


@pytest.mark.parametrize("name", ["pndm", "tcd"])
def test_they_estimate_the_picture_of_a_model_that_knows_it(name: str) -> None:
    """Their classes in diffusers keep no x0 estimate to compare with."""
    alpha_bar = reference(find(name), SD1).alphas_cumprod.double().numpy()
    picture, x = np.random.default_rng(1).standard_normal((2, *SHAPE))
    lanes = [np.zeros(SHAPE)] * 3
    for step in table(find(name), 20, SD1).steps:
        a = alpha_bar[int(step.timestep)]
        eps = (x - a**0.5 * picture) / (1 - a) ** 0.5
        x, *lanes, denoised = np.tensordot(step.matrix, np.stack([x, eps, np.zeros(SHAPE), *lanes]), axes=1)
        assert apart(denoised, picture) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_taken_only_where_it_is_drawn(name: str) -> None:
    made = table(find(name), 5, SD1)
    assert any(step.draws for step in made.steps) == METHODS[find(name).method].about.stochastic
    assert all(step.draws for step in made.steps if step.matrix[:, 2].any())


def test_ddim_draws_noise_when_asked() -> None:
    assert all(step.draws for step in table(find("ddim", eta=0.5), 5, SD1).steps)
    for name in ("ddim", "tcd"):
        assert not any(step.draws for step in table(find(name, eta=0.0), 5, SD1).steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_five_lanes_of_six_terms_and_stays_as_it_is(name: str) -> None:
    for step in table(find(name), 3, SD1).steps:
        assert step.matrix.shape == (5, 6)
        assert step.matrix.dtype == np.float64
        assert not step.matrix.flags.writeable
        assert {type(value) for value in (step.timestep, step.scale, *step.level)} == {float}


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_as_many_as_described(name: str) -> None:
    per_step = METHODS[find(name).method].about.calls_per_step
    assert len(table(find(name), 10, SD1).steps) == (11 if name == "pndm" else 10 * per_step - (per_step - 1))


def test_every_name_has_its_class() -> None:
    assert set(CLASSES) == set(NAMES)


def test_a_table_is_worked_out_once() -> None:
    assert table(find("ddim"), 12, SD1) is table(find("DDIM"), 12, SD1.model_copy())


@pytest.mark.parametrize("num_steps", [-1, 0, MAX_STEPS + 1])
def test_a_step_count_out_of_range_is_answered_with_the_range(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"{num_steps} steps: ask for 1 to {MAX_STEPS}"):
        table(find("ddim"), num_steps, SD1)
    assert len(table(find("ddim"), MAX_STEPS, SD1).steps) == MAX_STEPS
    with pytest.raises(ValueError, match="41 steps: ask for 1 to 40"):
        table(find("ddim"), 41, SD1.model_copy(update={"num_train_timesteps": 40}))


@pytest.mark.parametrize("skip", [-1, 5, 6])
def test_steps_that_are_not_there_cannot_be_left_out(skip: int) -> None:
    with pytest.raises(ValueError, match=f"Of 5 steps {skip} are to be left out: leave out 0 to 4"):
        table(find("euler"), 5, SD1, skip=skip)


def test_a_scheduler_that_nobody_found_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown scheduler 'newton'"):
        table(Scheduler("newton"), 5, SD1)
    with pytest.raises(ValueError, match="ddim has no karras levels"):
        table(Scheduler("ddim", "karras"), 5, SD1)
