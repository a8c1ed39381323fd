"""A checkpoint's scheduler config gives the name that requests use for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.checkpoints.diffusers_folder import CheckpointConfig


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
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert CheckpointConfig(copied, "copy").scheduler == name


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
        {},
    ],
)
def test_unsupported_schedulers_fall_back_to_pndm(copied: Path, config: dict[str, object]) -> None:
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert CheckpointConfig(copied, "copy").scheduler == "pndm"
