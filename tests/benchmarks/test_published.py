"""The results files in docs/benchmarks can be read."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from benchmarks.cluster.ray import RayResults
from benchmarks.cluster.results import SimulationResults
from benchmarks.cluster.scaling import ScalingResults
from benchmarks.lora.results import LoraResults
from benchmarks.peers.pipelines.results import PipelineResults
from benchmarks.peers.servers.results import ServingResults
from benchmarks.quality.results import QualityResults
from benchmarks.server.attacks import AttackResults
from benchmarks.server.capacity import CapacityResults
from benchmarks.server.degrade import DegradeResults
from benchmarks.server.fairness import FairnessResults
from benchmarks.server.few_steps import FewStepsResults
from benchmarks.server.memory import MemoryReport
from benchmarks.server.overhead import Overhead
from benchmarks.server.soak import SoakResults
from benchmarks.server.startup import Startup
from benchmarks.server.step_cache import StepCacheResults
from tests import ROOT

FILES = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))
MODELS: dict[str, type[BaseModel]] = {
    "attacks": AttackResults,
    "capacity": CapacityResults,
    "cluster": SimulationResults,
    "degrade": DegradeResults,
    "fairness": FairnessResults,
    "few-steps": FewStepsResults,
    "lora-demo": LoraResults,
    "memory-fp32": MemoryReport,
    "memory-int8": MemoryReport,
    "overhead": Overhead,
    "peers": PipelineResults,
    "peers-dial": PipelineResults,
    "quality": QualityResults,
    "ray": RayResults,
    "scaling": ScalingResults,
    "serving": ServingResults,
    "soak": SoakResults,
    "startup": Startup,
    "step-cache-demo": StepCacheResults,
}


def test_every_model_has_a_file() -> None:
    assert {path.stem for path in FILES} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_published_file_is_read(name: str) -> None:
    text = (ROOT / "docs" / "benchmarks" / f"{name}.json").read_bytes()
    assert MODELS[name].model_validate_json(text).model_dump(exclude_unset=True)
