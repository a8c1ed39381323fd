"""The systems that are compared: other pipelines over the same model, and our server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["eager", "compiled", "optimum", "genai", "stable-diffusion.cpp", "server"]
EAGER, FULL_EAGER = "torch-eager", "torch-eager-sd14"  # the references


@dataclass(frozen=True, slots=True)
class System:
    """A system that generates images."""

    name: str
    title: str
    kind: Kind
    model: str = "small"  # an architecture of benchmarks.models
    artifact: str = "checkpoint"  # what it loads, of all that is made from the model
    packages: tuple[str, ...] = ()  # that --peers-python must have
    backend: str = ""  # of our server
    force_fp32: bool = False  # keep OpenVINO from using BF16, its default on processors that have it
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a request to our server
    comparable: bool = True  # whether its images should equal those of torch-eager


_OPTIMUM = ("optimum-intel", "openvino")
_GENAI = ("openvino-genai", "openvino-tokenizers")
_CPP = ("stable-diffusion-cpp-python",)
_FAST = {"cache": "fast"}
# With random weights rows agree soon: guidance would end after two steps. It ends where that of the demo model does.
_FASTER = {"cache": "faster", "guidance_end": 0.55}
_REQUIREMENTS = "benchmarks/peers/pipelines/requirements.txt"
INSTALL = {
    "optimum-intel": f"pip install --no-deps optimum-intel, after the packages in {_REQUIREMENTS}",
    "openvino": "pip install openvino",
    "openvino-genai": "pip install openvino-genai",
    "openvino-tokenizers": "pip install openvino-tokenizers",
    "stable-diffusion-cpp-python": "pip install stable-diffusion-cpp-python (needs a C++ compiler)",
}


def _ours(name: str, title: str, *, backend: str = "openvino", precision: str = "") -> tuple[System, ...]:
    """Our server on a backend, at each position of the dial."""
    artifact = f"bundle-{precision}" if precision else "bundle"
    return (
        System(name, title, "server", artifact=artifact, backend=backend),
        System(f"{name}-fast", f"{title}, fast", "server", artifact=artifact, backend=backend, fields=_FAST),
        System(f"{name}-faster", f"{title}, faster", "server", artifact=artifact, backend=backend, fields=_FASTER),
    )


SYSTEMS = (
    System(EAGER, "diffusers, PyTorch eager", "eager"),
    System(FULL_EAGER, "diffusers, PyTorch eager, SD 1.4", "eager", model="sd15", comparable=False),
    System("torch-compile", "diffusers, torch.compile", "compiled"),
    System("optimum", "optimum-intel", "optimum", artifact="optimum-fp32", packages=_OPTIMUM),
    System("optimum-int8", "optimum-intel, INT8 weights", "optimum", artifact="optimum-int8", packages=_OPTIMUM),
    System("genai", "openvino-genai (C++)", "genai", artifact="optimum-fp32", packages=_OPTIMUM + _GENAI),
    System(
        "genai-fp32",
        "openvino-genai, forced to FP32",
        "genai",
        artifact="optimum-fp32",
        packages=_OPTIMUM + _GENAI,
        force_fp32=True,
    ),
    System("sdcpp", "stable-diffusion.cpp", "stable-diffusion.cpp", packages=_CPP, comparable=False),
    System(
        "sdcpp-sd14", "stable-diffusion.cpp, SD 1.4", "stable-diffusion.cpp", "sd15", packages=_CPP, comparable=False
    ),
    *_ours("onnxruntime", "ours, ONNX Runtime", backend="onnxruntime"),
    *_ours("openvino", "ours, OpenVINO"),
    *_ours("openvino-bf16", "ours, OpenVINO BF16", precision="bf16"),
    *_ours("openvino-int8", "ours, OpenVINO INT8", precision="int8"),
)
TITLES = tuple((system.name, system.title) for system in SYSTEMS)
