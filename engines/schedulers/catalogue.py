"""From a name to a scheduler, and from a scheduler to its table."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import get_args

from engines.limits import MAX_STEPS
from engines.manifest import Defaults, NoiseSchedule
from engines.schedulers.levels import Sigmas, Spacing
from engines.schedulers.methods import METHODS, Description, Option
from engines.schedulers.names import resolve
from engines.schedulers.steps import FinalSigma, Scheduler, Setting, Table

_SIGMAS: tuple[Sigmas, ...] = get_args(Sigmas)
_CHOICES: dict[Option, tuple[str, ...]] = {
    "timestep_spacing": get_args(Spacing),
    "final_sigmas_type": get_args(FinalSigma),
}
NAMES: tuple[str, ...] = tuple(
    Scheduler(name, sigmas).name for name, method in METHODS.items() for sigmas in method.about.sigmas
)


def find(
    name: str,
    *,
    sigmas: Sigmas | None = None,
    timestep_spacing: Spacing | None = None,
    final_sigmas_type: FinalSigma | None = None,
    eta: float | None = None,
) -> Scheduler:
    """The scheduler that `name` means, with options.

    Names are ours (dpmpp_2m_karras), those of diffusers' classes (EulerDiscreteScheduler), of AUTOMATIC1111's web UI
    (DPM++ 2M Karras) and of ComfyUI (dpm_2_ancestral); case, and the kind of separators, do not matter.

    Raises ValueError, with an alternative, for an unknown name and for options that the method does not have.
    """
    method, ending = resolve(name)
    if sigmas is not None and ending is not None and sigmas != ending:
        raise ValueError(f"{name} has {ending} levels, and sigmas says {sigmas}: leave one of them out.")
    scheduler = Scheduler(method, sigmas or ending or "default", timestep_spacing, final_sigmas_type, eta)
    _check(scheduler)
    return scheduler


def complete(asked: Scheduler, defaults: Defaults, *, num_steps: int) -> Scheduler:
    """The scheduler `asked` for, with what it leaves open as a model's requests have it by default.

    A spacing is every method's that has one, as in diffusers' `from_config`. eta and timesteps belong to the default
    method, and timesteps to the default number of steps too.
    """
    method, usual = METHODS[asked.method], find(defaults.scheduler)
    is_spaced = asked.timestep_spacing is None and "timestep_spacing" in method.about.options
    if is_spaced:
        asked = replace(asked, timestep_spacing=defaults.timestep_spacing)
    if asked.method != usual.method:
        return asked
    timesteps = defaults.timesteps if num_steps == defaults.num_inference_steps else None
    return replace(asked, eta=defaults.eta if asked.eta is None else asked.eta, timesteps=timesteps)


@lru_cache(maxsize=256)
def table(scheduler: Scheduler, num_steps: int, schedule: NoiseSchedule, *, skip: int = 0) -> Table:
    """Compile the table of `scheduler` for `num_steps` steps, without the first `skip`.

    Methods with a history begin it at the first step that is made, as diffusers' pipelines do from an image.

    Raises ValueError for a step count outside 1..MAX_STEPS or beyond num_train_timesteps, nothing left to do, a
    scheduler that `find` would not give, and what a method cannot do: predictions it is not defined for, more steps
    than have room.
    """
    _check(scheduler)
    method = METHODS[scheduler.method]
    most = min(MAX_STEPS, schedule.num_train_timesteps)
    if not 1 <= num_steps <= most:
        raise ValueError(f"{num_steps} steps: ask for 1 to {most}.")
    if not 0 <= skip < num_steps:
        raise ValueError(f"Of {num_steps} steps {skip} are to be left out: leave out 0 to {num_steps - 1}.")
    _check_timesteps(scheduler.timesteps, num_steps, schedule)
    if schedule.prediction_type not in method.about.predictions:
        raise ValueError(
            f"{scheduler.method} is not defined for models that predict the {schedule.prediction_type}: "
            "choose another scheduler, such as ddim."
        )
    zero_snr = schedule.rescale_betas_zero_snr and method.supports_zero_snr
    return method.make(Setting(scheduler, num_steps, schedule, skip, zero_snr))


def describe() -> tuple[Description, ...]:
    return tuple(method.about for method in METHODS.values())


def _check(scheduler: Scheduler) -> None:
    """Raise ValueError for a method that is not one, and for options that it does not have."""
    name = scheduler.method
    if name not in METHODS:
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(METHODS)}.")
    about = METHODS[name].about
    if scheduler.sigmas not in _SIGMAS:
        raise ValueError(f"sigmas {scheduler.sigmas!r}: choose one of {', '.join(_SIGMAS)}.")
    if scheduler.sigmas not in about.sigmas:
        those = ", ".join(one.name for one in describe() if scheduler.sigmas in one.sigmas)
        raise ValueError(f"{name} has no {scheduler.sigmas} levels: leave them out, or choose one of {those}.")
    given: dict[Option, str | float | None] = {
        "timestep_spacing": scheduler.timestep_spacing,
        "final_sigmas_type": scheduler.final_sigmas_type,
        "eta": scheduler.eta,
    }
    for option, value in given.items():
        if value is None:
            continue
        if option not in about.options:
            those = ", ".join(one.name for one in describe() if option in one.options)
            raise ValueError(f"{name} has no {option}: leave it out, or choose one of {those}.")
        if option in _CHOICES and value not in _CHOICES[option]:
            raise ValueError(f"{option} {value!r}: choose one of {', '.join(_CHOICES[option])}.")
    if scheduler.timesteps is not None and not METHODS[name].takes_timesteps:
        those = ", ".join(one for one, method in METHODS.items() if method.takes_timesteps)
        raise ValueError(f"{name} has no timesteps of one's choice: leave them out, or choose one of {those}.")
    if scheduler.eta is not None and not 0 <= scheduler.eta <= 1:
        raise ValueError(f"eta {scheduler.eta}: choose a value from 0 to 1.")


def _check_timesteps(timesteps: tuple[int, ...] | None, num_steps: int, schedule: NoiseSchedule) -> None:
    """Raise ValueError unless there is one for each step, and each is a training timestep below the one before."""
    if timesteps is None:
        return
    falls = all(later < earlier for earlier, later in pairwise(timesteps))
    if (
        len(timesteps) != num_steps
        or not falls
        or not 0 <= min(timesteps) <= max(timesteps) < schedule.num_train_timesteps
    ):
        raise ValueError(
            f"timesteps {', '.join(map(str, timesteps))}: choose {num_steps}, falling, from "
            f"{schedule.num_train_timesteps - 1} to 0."
        )
