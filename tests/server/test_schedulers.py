"""Each table against the diffusers class it stands for, stepped with the same model outputs and the same noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.base import MEMORY
from engines.manifest import NoiseSchedule
from server.noise import NoiseGenerator
from server.schedulers import NAMES, Table, table
from tests.references import CLASSES

# diffusers turns tensors into arrays by np.array(tensor), which torch answers the way numpy 1 asked.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

Array = NDArray[Any]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "linspace", "trailing"]

STOCHASTIC = ("euler_ancestral", "lcm")
SHAPE = (1, 4, 8, 8)
SEED = 42
REFUSED = [("euler_ancestral", "sample"), ("pndm", "sample")]
PREDICTED = [(name, kind) for name in NAMES for kind in ("epsilon", "v_prediction", "sample")]
ACCEPTED = [case for case in PREDICTED if case not in REFUSED]

SD1 = NoiseSchedule(steps_offset=1, set_alpha_to_one=False)
SCHEDULES = {
    "sd1": SD1,
    "sd2-v": SD1.model_copy(update={"prediction_type": "v_prediction"}),
    "alpha-one": NoiseSchedule(set_alpha_to_one=True),
    "sigma-min": NoiseSchedule(final_sigmas_type="sigma_min"),
    "linear": NoiseSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "cosine": NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
    "trained": NoiseSchedule(num_train_timesteps=100, trained_betas=tuple(np.linspace(0.001, 0.1, 100).tolist())),
    "400-training-timesteps": NoiseSchedule(num_train_timesteps=400, beta_end=0.03),
}


@dataclass
class Run:
    """What one loop over a scheduler's steps told the UNet, and what it made."""

    init_scale: float
    timesteps: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    xs: list[Array] = field(default_factory=list)
    denoised: list[Array] = field(default_factory=list)  # empty where the class keeps it to itself


def reference(name: str, schedule: NoiseSchedule) -> Any:
    cls, options = CLASSES[name]
    return cls.from_config({**schedule.model_dump(exclude_none=True), **options})


def outputs(calls: int) -> Array:
    return np.random.default_rng(calls).standard_normal((calls, *SHAPE)).astype(np.float32)


def run_diffusers(name: str, num_steps: int, schedule: NoiseSchedule) -> Run:
    scheduler = reference(name, schedule)
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(
            0
        )  # it would look the first timestep up, and skip it where rounding made it come twice
    generator = torch.Generator("cpu").manual_seed(SEED)
    # Fresh noise has the dtype of the model's output, and torch's float64 noise is another stream.
    dtype = torch.float32 if name in STOCHASTIC else torch.float64
    extra = {"generator": generator} if name in STOCHASTIC else {}
    run = Run(float(scheduler.init_noise_sigma))
    x = torch.randn(SHAPE, generator=generator).to(dtype) * scheduler.init_noise_sigma
    for t, model in zip(scheduler.timesteps, outputs(len(scheduler.timesteps)), strict=True):
        run.timesteps.append(t.item())
        run.scales.append(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t).item())
        step = scheduler.step(torch.from_numpy(model).to(dtype), t, x, **extra)
        x = step.prev_sample
        run.xs.append(x.numpy())
        if name.startswith("dpmpp"):
            run.denoised.append(scheduler.model_outputs[-1].numpy())
        elif name == "lcm":
            run.denoised.append(step.denoised.numpy())
        elif name != "pndm":
            run.denoised.append(step.pred_original_sample.numpy())
    return run


def run_table(table: Table, *, memory: float = 0.0) -> Run:
    noise = NoiseGenerator(SEED)
    run = Run(table.init_scale)
    x: Array = table.init_scale * noise.randn(SHAPE)
    lanes: list[Array] = [np.full(SHAPE, memory)] * MEMORY
    for step, model in zip(table.steps, outputs(len(table.steps)), strict=True):
        fresh = noise.randn(SHAPE) if table.stochastic else np.zeros(SHAPE)
        x, *lanes, denoised = np.tensordot(step.matrix, np.stack([x, model, fresh, *lanes]), axes=1)
        run.timesteps.append(step.timestep)
        run.scales.append(step.scale)
        run.xs.append(x)
        run.denoised.append(denoised)
    return run


def apart(ours: Array, theirs: Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(name: str, num_steps: int, schedule: NoiseSchedule) -> None:
    ours, theirs = run_table(table(name, num_steps, schedule)), run_diffusers(name, num_steps, schedule)
    atol = 0.0
    if name == "euler_karras":  # fractions, interpolated from sigmas that diffusers has in float32
        atol = 5e-4
    elif name == "dpmpp_2m_karras" and schedule.beta_schedule == "squaredcos_cap_v2":
        atol = 1.0  # truncated there: of what is 999 up to rounding, diffusers makes 998
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=0, atol=atol)
    np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-5)
    assert ours.init_scale == pytest.approx(theirs.init_scale, rel=1e-5)
    for mine, expected in zip(ours.xs, theirs.xs, strict=True):
        assert apart(mine, expected) < 1e-5
    for mine, expected in zip(ours.denoised, theirs.denoised, strict=bool(theirs.denoised)):
        assert apart(mine, expected) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize(("name", "prediction"), ACCEPTED)
def test_a_table_does_what_diffusers_does(
    name: str, prediction: Prediction, spacing: Spacing | None, num_steps: int
) -> None:
    check(name, num_steps, NoiseSchedule(prediction_type=prediction, timestep_spacing=spacing))


@pytest.mark.parametrize("num_steps", [1, 14, 15, 30])  # dpmpp_2m ends at first order below 15
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_a_table_follows_the_checkpoint(name: str, schedule: NoiseSchedule, num_steps: int) -> None:
    check(name, num_steps, schedule)


@pytest.mark.parametrize("num_steps", [61, 100, 333, 999])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lcm"])
def test_long_tables_have_diffusers_timesteps(name: str, num_steps: int) -> None:
    scheduler = reference(name, SD1)
    scheduler.set_timesteps(num_steps)
    timesteps = [step.timestep for step in table(name, num_steps, SD1).steps]
    np.testing.assert_allclose(timesteps, scheduler.timesteps, rtol=0, atol=5e-4 if name == "euler_karras" else 0)


@pytest.mark.parametrize(("name", "prediction"), REFUSED)
def test_what_diffusers_refuses_is_refused(name: str, prediction: Prediction) -> None:
    schedule = NoiseSchedule(prediction_type=prediction)
    with pytest.raises((ValueError, NotImplementedError)):
        run_diffusers(name, 4, schedule)
    with pytest.raises(ValueError, match=f"{name} is not defined for models that predict the sample"):
        table(name, 4, schedule)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_steps_past_the_last_training_timestep_are_refused(name: str) -> None:
    with pytest.raises(IndexError):
        run_diffusers(name, 1000, SD1)
    with pytest.raises(ValueError, match="1000 steps and steps_offset 1 overrun the training timesteps: ask for fewer"):
        table(name, 1000, SD1)


def test_lcm_takes_no_more_steps_than_it_was_distilled_on() -> None:
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 51"):
        run_diffusers("lcm", 51, SD1)
    with pytest.raises(ValueError, match="51 steps: lcm takes 1 to 50"):
        table("lcm", 51, SD1)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_dpmpp_2m_refuses_timesteps_that_come_twice(spacing: Spacing) -> None:
    schedule = NoiseSchedule(timestep_spacing=spacing)
    assert not np.isfinite(run_diffusers("dpmpp_2m", 1000, schedule).xs[-1]).all()
    with pytest.raises(ValueError, match="1000 steps of dpmpp_2m do not fit"):
        table("dpmpp_2m", 1000, schedule)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm"])
def test_trailing_makes_no_step_to_spare(name: str) -> None:
    """np.arange's rounding gives diffusers a 62nd of 61 timesteps, -1; a table leaves its reference there."""
    schedule = NoiseSchedule(timestep_spacing="trailing")
    scheduler = reference(name, schedule)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1
    assert [step.timestep for step in table(name, 61, schedule).steps] == scheduler.timesteps[:-1].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 20])
def test_memory_is_written_before_it_is_read(name: str, num_steps: int) -> None:
    clean, dirty = (run_table(table(name, num_steps, SD1), memory=memory) for memory in (0.0, 1e3))
    np.testing.assert_array_equal(clean.xs, dirty.xs)
    np.testing.assert_array_equal(clean.denoised, dirty.denoised)


def test_pndm_estimates_the_picture_of_a_model_that_knows_it() -> None:
    """Its class in diffusers keeps no x0 estimate to compare with."""
    alpha_bar = reference("pndm", SD1).alphas_cumprod.double().numpy()
    picture, x = np.random.default_rng(SEED).standard_normal((2, *SHAPE))
    lanes: list[Array] = [np.zeros(SHAPE)] * MEMORY
    for step in table("pndm", 20, SD1).steps:
        a = alpha_bar[int(step.timestep)]
        eps = (x - a**0.5 * picture) / (1 - a) ** 0.5
        x, *lanes, denoised = np.tensordot(step.matrix, np.stack([x, eps, np.zeros(SHAPE), *lanes]), axes=1)
        assert apart(denoised, picture) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_only_stochastic_methods_take_noise(name: str) -> None:
    made = table(name, 5, SD1)
    assert made.stochastic == (name in STOCHASTIC)
    assert any(step.matrix[:, 2].any() for step in made.steps) == made.stochastic


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_five_lanes_of_six_terms_and_stays_as_it_is(name: str) -> None:
    for step in table(name, 3, SD1).steps:
        assert step.matrix.shape == (5, 6)
        assert step.matrix.dtype == np.float64
        assert not step.matrix.flags.writeable


def test_a_table_is_worked_out_once() -> None:
    assert table("ddim", 12, SD1) is table("ddim", 12, SD1.model_copy())


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler 'heun': choose one of ddim, dpmpp_2m, .*pndm"):
        table("heun", 20, SD1)


@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_a_step_count_out_of_range_is_answered_with_the_range(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"{num_steps} steps: ask for 1 to 1000"):
        table("ddim", num_steps, SD1)
