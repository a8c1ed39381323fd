"""A checkpoint's scheduler config gives the name that requests use for it."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

from engines.checkpoints.diffusers_folder import CheckpointConfig
from tests.support.checkpoints import edit


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "euler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler_karras"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_beta_sigmas": True}, "kdpm2_ancestral_beta"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True},
            "dpmpp_3m_karras",
        ),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_exponential_sigmas": True,
            },
            "dpmpp_2m_sde_exponential",
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, "dpmpp_3s"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_type": "bh2"}, "dpmpp_2s"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "disable_corrector": []}, "unipc"),
        ({"_class_name": "DEISMultistepScheduler", "use_karras_sigmas": True}, "deis_karras"),
        ({"_class_name": "TCDScheduler"}, "tcd"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, "ddim"),  # which that class ignores
    ],
)
def test_scheduler_names(copied: Path, config: dict[str, object], name: str) -> None:
    publish(copied, config)
    assert CheckpointConfig(copied, "copy").scheduler == name
    assert not CheckpointConfig(copied, "copy").not_followed


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "IPNDMScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
        {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
        {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "DEISMultistepScheduler", "solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler", "predict_x0": False},
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]},
        {"_class_name": "DDIMScheduler", "thresholding": True},
    ],
)
def test_unsupported_schedulers_fall_back_to_pndm(copied: Path, config: dict[str, object]) -> None:
    publish(copied, config)
    found = CheckpointConfig(copied, "copy")
    assert found.scheduler == "pndm"
    (line,) = found.not_followed
    asked = [*config.items()][-1]
    assert (asked[0] in line and json.dumps(asked[1]) in line) or str(asked[1]) in line
    assert "requests use pndm by default" in line


def test_the_class_is_the_one_that_the_index_names(copied: Path) -> None:
    """As in diffusers, whose pipeline makes the index's class from a config that may name another."""
    edit(copied / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    assert CheckpointConfig(copied, "copy").scheduler == "pndm"
    edit(copied / "model_index.json", scheduler=None)
    assert CheckpointConfig(copied, "copy").scheduler == "euler"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_sample", True),
        ("euler_at_final", True),
        ("interpolation_type", "log_linear"),
        ("lambda_min_clipped", -5.1),
        ("lower_order_final", False),
        ("original_inference_steps", 100),
        ("sigma_max", 80.0),
        ("skip_prk_steps", False),
        ("timestep_scaling", 1.0),
        ("timestep_type", "continuous"),
        ("use_dynamic_shifting", True),
        ("variance_type", "fixed_large"),
    ],
)
def test_options_that_are_not_followed_are_listed(copied: Path, option: str, value: object) -> None:
    assert not CheckpointConfig(copied, "copy").not_followed
    edit(copied / "scheduler" / "scheduler_config.json", **{option: value})
    (line,) = CheckpointConfig(copied, "copy").not_followed
    assert line == f"scheduler/scheduler_config.json asks for {option} {json.dumps(value)}: this is not followed."


_UNSUPPORTED = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}


@pytest.mark.filterwarnings("ignore:__array_")  # of torch with numpy 2
@pytest.mark.parametrize("kind", sorted({*KarrasDiffusionSchedulers.__members__, "LCMScheduler"} - _UNSUPPORTED))
def test_what_diffusers_saves_of_a_scheduler_is_followed(copied: Path, kind: str) -> None:
    made = getattr(diffusers, kind)
    corrections = {"clip_sample": False, "skip_prk_steps": True}
    made(**{key: value for key, value in corrections.items() if key in signature(made).parameters}).save_pretrained(
        copied / "scheduler"
    )
    edit(copied / "model_index.json", scheduler=["diffusers", kind])
    assert not CheckpointConfig(copied, "copy").not_followed


def publish(folder: Path, config: dict[str, object]) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit(folder / "model_index.json", scheduler=["diffusers", config["_class_name"]])
