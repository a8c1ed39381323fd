"""What people call schedulers, and what they are told when nothing is called so."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import NoiseSchedule
from engines.schedulers import METHODS, NAMES, Scheduler, Sigmas, describe, find, table
from tests.support.references import CLASSES

KNOWN: dict[str, Scheduler] = {
    # ours
    "ddim": Scheduler("ddim"),
    "dpmpp_2m_karras": Scheduler("dpmpp_2m", "karras"),
    "heun_beta": Scheduler("heun", "beta"),
    "kdpm2_ancestral_exponential": Scheduler("kdpm2_ancestral", "exponential"),
    "  Euler_Ancestral ": Scheduler("euler_ancestral"),
    # diffusers'
    "EulerDiscreteScheduler": Scheduler("euler"),
    "EulerDiscrete": Scheduler("euler"),
    "eulerancestraldiscretescheduler": Scheduler("euler_ancestral"),
    "DDPMScheduler": Scheduler("ddpm"),
    "DPMSolverMultistepScheduler": Scheduler("dpmpp_2m"),
    "DPMSolverSinglestepScheduler": Scheduler("dpmpp_2s"),
    "KDPM2AncestralDiscreteScheduler": Scheduler("kdpm2_ancestral"),
    "PNDM": Scheduler("pndm"),
    "UniPCMultistep": Scheduler("unipc"),
    # AUTOMATIC1111's
    "DPM++ 2M": Scheduler("dpmpp_2m"),
    "DPM++ 2M Karras": Scheduler("dpmpp_2m", "karras"),
    "dpm++ 2m karras": Scheduler("dpmpp_2m", "karras"),
    "DPM++ 2M SDE": Scheduler("dpmpp_2m_sde"),
    "DPM++ 2M SDE Exponential": Scheduler("dpmpp_2m_sde", "exponential"),
    "DPM++ 3M SDE Karras": Scheduler("dpmpp_3m_sde", "karras"),
    "Euler": Scheduler("euler"),
    "Euler a": Scheduler("euler_ancestral"),
    "LMS Karras": Scheduler("lms", "karras"),
    "Heun": Scheduler("heun"),
    "DPM2": Scheduler("kdpm2"),
    "DPM2 Karras": Scheduler("kdpm2", "karras"),
    "DPM2 a": Scheduler("kdpm2_ancestral"),
    "DPM2  a   Karras": Scheduler("kdpm2_ancestral", "karras"),
    "DEIS": Scheduler("deis"),
    "DDIM": Scheduler("ddim"),
    "DDPM": Scheduler("ddpm"),
    "PLMS": Scheduler("pndm"),
    "UniPC": Scheduler("unipc"),
    "LCM": Scheduler("lcm"),
    "TCD": Scheduler("tcd"),
    "k_euler_a": Scheduler("euler_ancestral"),
    "k_dpm_2_a": Scheduler("kdpm2_ancestral"),
    "k_dpmpp_2m": Scheduler("dpmpp_2m"),
    "k_lms": Scheduler("lms"),
    "k_dpmpp_2m_ka": Scheduler("dpmpp_2m", "karras"),
    "k_dpmpp_2m_sde_exp": Scheduler("dpmpp_2m_sde", "exponential"),
    "sample_dpmpp_2m": Scheduler("dpmpp_2m"),
    # ComfyUI's
    "euler_ancestral": Scheduler("euler_ancestral"),
    "dpm_2": Scheduler("kdpm2"),
    "dpm_2_ancestral": Scheduler("kdpm2_ancestral"),
    "dpmpp_2m": Scheduler("dpmpp_2m"),
    "dpmpp_2m_sde": Scheduler("dpmpp_2m_sde"),
    "dpmpp_2m_sde_gpu": Scheduler("dpmpp_2m_sde"),
    "dpmpp_3m_sde_gpu": Scheduler("dpmpp_3m_sde"),
    # InvokeAI's
    "dpmpp_2m_k": Scheduler("dpmpp_2m", "karras"),
    "kdpm_2_a": Scheduler("kdpm2_ancestral"),
}

# ComfyUI's KSAMPLER_NAMES and AUTOMATIC1111's samplers that are not methods here, and the one that is suggested.
ABSENT = {
    "k_dpm_fast": "dpmpp_3s",
    "DPM fast": "dpmpp_3s",
    "dpm_adaptive": "dpmpp_3m",
    "k_dpm_ad": "dpmpp_3m",
    "dpmpp_sde": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_2m_sde",
    "k_dpmpp_sde_ka": "dpmpp_2m_sde",
    "dpmpp_2s_ancestral": "dpmpp_2s",
    "k_dpmpp_2s_a": "dpmpp_2s",
    "DPM++ 2M SDE Heun Karras": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "Restart": "heun",
    "heunpp2": "heun",
    "ipndm": "lms",
    "ipndm_v": "lms",
    "res_multistep": "dpmpp_2m",
    "gradient_estimation": "dpmpp_2m",
    "er_sde": "dpmpp_2m_sde",
    "seeds_2": "dpmpp_2m_sde",
    "sa_solver_pece": "dpmpp_2m_sde",
    "DDIM CFG++": "ddim",
    "euler_cfg_pp": "euler",
    "euler_ancestral_cfg_pp": "euler_ancestral",
    "dpmpp_2m_cfg_pp": "dpmpp_2m",
}

# Noise levels, which those programs choose apart from the method, and what is suggested.
LEVELS = {
    "karras": "as sigmas",
    "Exponential": "as sigmas",
    "beta": "as sigmas",
    "normal": "timestep_spacing linspace",
    "Uniform": "timestep_spacing linspace",
    "simple": "timestep_spacing trailing",
    "SGM Uniform": "timestep_spacing trailing",
    "ddim_uniform": "timestep_spacing leading",
    "Automatic": "the method alone",
    "KL Optimal": "sigmas karras, exponential or beta",
    "Euler SGM Uniform": "send euler, and timestep_spacing trailing",
    "dpmpp_2m_normal": "send dpmpp_2m, and timestep_spacing linspace",
    "DPM++ 2M Polyexponential": "send dpmpp_2m, and sigmas karras",
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_in_any_dialect_is_understood(name: str) -> None:
    assert find(name) == find(name.upper()) == find(f" {name}\n") == KNOWN[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_own_name_is_its_own(name: str) -> None:
    assert find(name).name == name


def test_a_class_is_a_name_of_what_it_is_by_default() -> None:
    for name, (kind, asked) in CLASSES.items():
        if set(asked) <= {"clip_sample"}:
            assert find(kind.__name__).name == name


def test_every_alias_leads_to_its_method_and_to_no_other() -> None:
    for one in describe():
        assert {find(alias).method for alias in (one.name, one.title, *one.aliases)} == {one.name}


@settings(derandomize=True, deadline=None, database=None)
@given(st.text(max_size=30))
def test_no_text_is_more_than_refused(text: str) -> None:
    with suppress(ValueError):
        assert find(text).name in NAMES


@pytest.mark.parametrize("name", ABSENT)
def test_a_method_that_is_not_here_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="is unavailable: ") as refused:
        find(name)
    nearest = str(refused.value).rpartition("take ")[2].split()[0].rstrip(".")
    assert nearest == ABSENT[name]
    assert find(nearest).name == nearest


@pytest.mark.parametrize("name", LEVELS)
def test_levels_in_place_of_a_method_are_told_where_to_go(name: str) -> None:
    with pytest.raises(ValueError, match=f"is unavailable: .*{LEVELS[name]}"):
        find(name)


def test_a_misspelt_name_of_a_method_that_is_not_here_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler 'dpm fastt': dpm fast is unavailable: .* take dpmpp_3s"):
        find("dpm fastt")


# --- options


def test_options_are_kept() -> None:
    assert find("DPM++ 2M", sigmas="karras", timestep_spacing="trailing", final_sigmas_type="sigma_min") == Scheduler(
        "dpmpp_2m", "karras", "trailing", "sigma_min"
    )
    assert find("ddim", eta=0.5).eta == 0.5
    assert find("dpmpp_2m_karras", sigmas="karras") == find("dpmpp_2m_karras")


@pytest.mark.parametrize(
    ("name", "asked", "complaint"),
    [
        ("dpmpp_2m_karras", {"sigmas": "beta"}, "dpmpp_2m_karras has karras levels, and sigmas says beta: leave one"),
        ("DPM++ 2M Karras", {"sigmas": "default"}, "DPM.. 2M Karras has karras levels, and sigmas says default"),
        ("ddim_karras", {}, "ddim has no karras levels: leave them out, or choose one of lms, euler, heun, "),
        ("Euler a Karras", {}, "euler_ancestral has no karras levels"),
        ("lcm", {"sigmas": "beta"}, "lcm has no beta levels"),
        ("euler", {"sigmas": "steep"}, "sigmas 'steep': choose one of default, karras, exponential, beta"),
        ("euler", {"eta": 0.5}, "euler has no eta: leave it out, or choose one of ddim, tcd"),
        ("ddim", {"eta": 1.5}, "eta 1.5: choose a value from 0 to 1"),
        ("ddim", {"eta": -0.1}, "eta -0.1: choose a value from 0 to 1"),
        ("ddim", {"eta": float("nan")}, "eta nan: choose a value from 0 to 1"),
        ("dpmpp_2s", {"timestep_spacing": "trailing"}, "dpmpp_2s has no timestep_spacing: leave it out, or choose one"),
        ("tcd", {"timestep_spacing": "leading"}, "tcd has no timestep_spacing"),
        ("euler", {"timestep_spacing": "even"}, "timestep_spacing 'even': choose one of leading, linspace, trailing"),
        (
            "heun",
            {"final_sigmas_type": "sigma_min"},
            "heun has no final_sigmas_type: leave it out, or choose one of eu",
        ),
        ("euler", {"final_sigmas_type": "none"}, "final_sigmas_type 'none': choose one of zero, sigma_min"),
    ],
)
def test_what_a_method_does_not_have_is_refused(name: str, asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        find(name, **asked)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("newton", "unknown scheduler 'newton': choose one of ddim, ddpm, pndm, .*, tcd, many of them with karras"),
        ("dpmpp_2n", r"did you mean dpmpp_2\w+\?"),
        ("eulr", r"did you mean euler\?"),
        ("dpmpp_2m_karas", r"did you mean dpmpp_2m_karras\?"),
        ("dpm++ 2m karas", r"did you mean dpmpp_2m_karras\?"),
        ("DPM++ 2M SD Karras", r"did you mean dpmpp_2m_sde_karras\?"),
        ("", "unknown scheduler ''"),
        ("DPM++ SDE Karras", "DPM.. SDE Karras is unavailable: its noise comes from a Brownian tree"),
        ("DPMSolverSDEScheduler", "Brownian tree, which torch's seeds do not replay: take dpmpp_2m_sde"),
        ("DPM adaptive", "it adapts its steps to the image"),
        ("DPM++ 2S a Karras", "diffusers has no class of it to compare with: take dpmpp_2s"),
        ("FlowMatchEulerDiscreteScheduler", "it is for models of another kind"),
        ("IPNDMScheduler", "its noise levels are its own"),
    ],
)
def test_a_name_that_nobody_has_is_answered_with_those_there_are(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        find(name)


# --- descriptions


def test_descriptions_say_what_tables_do() -> None:
    schedule = NoiseSchedule()
    for one in describe():
        made = table(find(one.name), 7, schedule)
        assert any(step.draws for step in made.steps) == one.stochastic
        assert (len(made.steps) > 8) == (one.calls_per_step == 2)
        assert one.summary.endswith(".")
        assert len(one.summary) < 120


def test_descriptions_name_every_scheduler_in_order() -> None:
    assert [one.name for one in describe()] == list(METHODS)
    assert [Scheduler(one.name, sigmas).name for one in describe() for sigmas in one.sigmas] == list(NAMES)
    assert len(set(NAMES)) == len(NAMES) == 58


@pytest.mark.parametrize("name", METHODS)
def test_options_are_those_of_diffusers_class(name: str) -> None:
    """The class takes them, and no others, from a checkpoint's config."""
    about, config = METHODS[name].about, inspect.signature(CLASSES[name][0].__init__).parameters
    for sigmas in get_args(Sigmas)[1:]:
        assert (sigmas in about.sigmas) == (f"use_{sigmas}_sigmas" in config)
    assert ("final_sigmas_type" in about.options) == ("final_sigmas_type" in config)
    if name not in ("lcm", "tcd"):  # whose classes have one and ignore it
        assert ("timestep_spacing" in about.options) == ("timestep_spacing" in config)
    assert METHODS[name].supports_zero_snr == ("rescale_betas_zero_snr" in config)
