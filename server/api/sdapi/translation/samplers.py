"""Samplers and schedulers by the web UI's names."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from engines.manifest import Manifest
from engines.schedulers import Description, Sigmas, Spacing, describe, find
from server.api.sdapi.errors import rejected

_AUTOMATIC = "automatic"
_SPACINGS: dict[str, Spacing] = {  # schedulers that are a spacing of the timesteps here: the same, or nearly
    "uniform": "linspace",
    "normal": "linspace",
    "sgm_uniform": "trailing",
    "simple": "trailing",
    "ddim": "leading",
}
_APPROXIMATE = {"normal", "sgm_uniform", "simple", "ddim"}
_LABELS = {"sgm_uniform": "SGM Uniform", "ddim": "DDIM"}
_SIGMAS: dict[str, Sigmas] = {one: one for one in get_args(Sigmas) if one != "default"}
_ALIASES = {"sgmuniform": "sgm_uniform"}


class Sampling(NamedTuple):
    """How to sample, in the fields of latentd's own API."""

    scheduler: str | None = None  # None: the model's default
    sigmas: Sigmas | None = None
    timestep_spacing: Spacing | None = None
    eta: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a request."""
        values = self._asdict()
        del values["warnings"]
        return values


class Sampler(BaseModel):
    """A sampling method."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerItem(BaseModel):
    """A noise schedule."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float | None = -1
    need_inner_model: bool | None = False


def samplers(manifest: Manifest) -> list[Sampler]:
    """The samplers of the served model."""
    prediction = manifest.noise_schedule.prediction_type
    return [
        Sampler(name=one.title, aliases=[one.name, *one.aliases], options={})
        for one in describe()
        if prediction in one.predictions
    ]


def schedulers() -> list[SchedulerItem]:
    names = (_AUTOMATIC, *_SIGMAS, *_SPACINGS)
    return [SchedulerItem(name=name, label=_LABELS.get(name, name.replace("_", " ").title())) for name in names]


def sampling(sampler: str | None, scheduler: str | None, eta: float | None) -> Sampling:
    """What `sampler` and `scheduler` mean. Raises InvalidRequest."""
    schedule = _key(scheduler)
    name = None if _key(sampler) in ("", _AUTOMATIC) else sampler
    if schedule in ("", _AUTOMATIC):
        return Sampling(name, eta=_eta(name, eta))
    if sigmas := _SIGMAS.get(schedule):
        return Sampling(name, sigmas, eta=_eta(name, eta))
    if spacing := _SPACINGS.get(schedule):
        warnings = (f"scheduler: {scheduler} is the timestep spacing {spacing} here, which is nearest.",)
        return Sampling(name, None, spacing, _eta(name, eta), warnings if schedule in _APPROXIMATE else ())
    known = ", ".join(one.label for one in schedulers())
    raise rejected("scheduler", f"There is no such scheduler: choose one of {known}.")


def _key(name: str | None) -> str:
    key = (name or "").strip().lower().replace(" ", "_")
    return _ALIASES.get(key, key)


def _eta(name: str | None, eta: float | None) -> float | None:
    """The eta of methods that have one. The web UI ignores it in others, and clients send 1 with all of them."""
    about = None if name is None else _description(name)
    if about is None or eta is None:
        return None
    if "eta" in about.options:
        return eta
    if about.stochastic and eta != 1:
        raise rejected("eta", f"{about.title} has an eta of 1 here: leave it out, or choose a sampler without noise.")
    return None


def _description(name: str) -> Description | None:
    """The method that `name` means; None where it means none, which intake refuses."""
    try:
        method = find(name).method
    except ValueError:
        return None
    return next(one for one in describe() if one.name == method)
