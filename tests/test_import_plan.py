"""Who may import whom. The arrows point down only; a room that needs one more says so here, in review."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room and the rooms of this project it may import.
ENGINES: dict[str, set[str]] = {
    "engines.base": set(),
    "engines.manifest": {"engines.base"},
    "engines.progress": set(),
    "engines.cores": set(),
    "engines.profiles": {"engines.base", "engines.manifest"},
    # The backends.
    "engines.host": {"engines.base"},
    "engines.mapped": set(),
    "engines.onnxruntime": {"engines.base", "engines.cores", "engines.host"},
    "engines.onnxruntime_cuda": {"engines.base", "engines.cuda"},
    "engines.openvino": {"engines.base", "engines.cores", "engines.host", "engines.mapped"},
    "engines.cuda": {"engines.base", "engines.manifest"},
    "engines.tensorrt": {"engines.base", "engines.cuda", "engines.manifest"},
    "engines.tensorrt_rtx": {"engines.cuda", "engines.tensorrt"},
    "engines.present": {"engines.base", "engines.cuda", "engines.manifest", "engines.tensorrt"},
    # From a checkpoint to ONNX.
    "engines.checkpoint": {"engines.base", "engines.manifest", "engines.progress"},
    "engines.load": {"engines.checkpoint", "engines.progress"},
    "engines.graphs": {"engines.base"},
    "engines.trace": {"engines.base", "engines.graphs", "engines.load", "engines.manifest"},
    "engines.weights": {"engines.base", "engines.manifest"},
    "engines.preview": {"engines.manifest"},
    "engines.trajectory": {"engines.base", "engines.manifest", "engines.progress"},
    "engines.verify": {
        "engines.base",
        "engines.manifest",
        "engines.profiles",
        "engines.progress",
        "engines.trajectory",
    },
    "engines.export": {
        "engines.base",
        "engines.checkpoint",
        "engines.host",
        "engines.load",
        "engines.manifest",
        "engines.onnxruntime",
        "engines.progress",
        "engines.trace",
        "engines.verify",
        "engines.weights",
    },
    "engines.bundle": {
        "engines.base",
        "engines.checkpoint",
        "engines.export",
        "engines.load",
        "engines.manifest",
        "engines.preview",
        "engines.profiles",
        "engines.progress",
    },
    # From ONNX to engines.
    "engines.tensorrt_build": {"engines.base", "engines.progress"},
    "engines.quantize": {"engines.base", "engines.manifest", "engines.openvino"},
    "engines.compile": {
        "engines.base",
        "engines.manifest",
        "engines.present",
        "engines.profiles",
        "engines.progress",
        "engines.quantize",
        "engines.tensorrt_build",
        "engines.trajectory",
    },
    "engines.console": {"engines.base", "engines.manifest", "engines.profiles", "engines.progress"},
}
SERVER: dict[str, set[str]] = {
    "server.errors": set(),
    "server.noise": set(),
    "server.prompts": set(),
    "server.tokenizer": {"engines.base", "server.prompts"},
    "server.schedulers.levels": {"engines.manifest"},
    "server.schedulers.steps": {"engines.base", "engines.manifest", "server.schedulers.levels"},
    "server.schedulers.discrete": {"server.schedulers.levels", "server.schedulers.steps"},
    "server.schedulers.sigma": {"server.schedulers.levels", "server.schedulers.steps"},
    "server.schedulers.multistep": {"server.schedulers.levels", "server.schedulers.steps"},
    "server.schedulers.methods": {
        "server.schedulers.discrete",
        "server.schedulers.levels",
        "server.schedulers.multistep",
        "server.schedulers.sigma",
        "server.schedulers.steps",
    },
    "server.schedulers.catalogue": {
        "engines.manifest",
        "server.schedulers.levels",
        "server.schedulers.methods",
        "server.schedulers.steps",
    },
    "server.request": {"engines.manifest", "server.errors", "server.schedulers", "server.tokenizer"},
    "server.images": {"server.request"},
    "server.uploads": {"engines.manifest", "server.errors"},
    "server.schemas": {"server.images", "server.request", "server.schedulers", "server.tokenizer", "server.uploads"},
    "server.intake": {
        "engines.manifest",
        "server.errors",
        "server.request",
        "server.schedulers",
        "server.schemas",
        "server.tokenizer",
        "server.uploads",
    },
    "server.batcher": {"engines.manifest", "server.errors", "server.request"},
    "server.pace": {"engines.manifest", "server.request"},
    "server.metrics": {"engines.manifest", "server.errors", "server.pace", "server.request"},
    "server.compiling": {"engines.base", "engines.manifest", "engines.present"},
    "server.fastest": {
        "engines.base",
        "engines.cores",
        "engines.manifest",
        "engines.present",
        "server.pace",
        "server.pipeline",
        "server.trace",
    },
    "server.trace": {"engines.base"},
    "server.watchdog": set(),
    "server.plan": {"engines.base", "server.noise", "server.request", "server.schedulers"},
    "server.prompt_pool": {"engines.base", "engines.manifest", "server.tokenizer"},
    "server.canvas": {"engines.base", "engines.manifest", "server.noise", "server.plan", "server.request"},
    "server.pipeline": {
        "engines.base",
        "engines.manifest",
        "server.canvas",
        "server.errors",
        "server.noise",
        "server.pace",
        "server.plan",
        "server.prompt_pool",
        "server.request",
        "server.trace",
    },
    "server.executor": {
        "engines.base",
        "server.batcher",
        "server.errors",
        "server.metrics",
        "server.pace",
        "server.pipeline",
        "server.plan",
        "server.request",
        "server.trace",
        "server.watchdog",
    },
    "server.settings": {"engines.base", "engines.demo", "server.request"},
}
ALLOWED = ENGINES | SERVER
ONLY_TO_BUILD = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors"}
EXPORTERS = {"engines.graphs", "engines.load", "engines.trace", "engines.weights", "engines.preview", "engines.export"}
# What only a build needs; `engines.present` and `engines.manifest` are all that the server asks about one.
BUILDERS = EXPORTERS | {
    "engines.bundle",
    "engines.checkpoint",
    "engines.compile",
    "engines.console",
    "engines.progress",
    "engines.quantize",
    "engines.tensorrt_build",
    "engines.trajectory",
    "engines.verify",
}


def modules(folder: str) -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(module: str) -> set[str]:
    """Every module that `module` names in an import, at the top or inside a function."""
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {name for name in inside if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= known or {node.module}
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in {"engines", "server", "loadtest", "build_engines"}}


@pytest.mark.parametrize("module", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(module: str) -> None:
    assert ours(imports(module)) <= ALLOWED[module]


def test_every_room_is_in_the_plan() -> None:
    listed = {*ALLOWED, "server.wiring", "server.app", "server.__main__"}
    rooms = {name for name in modules("engines") + modules("server") if not name.endswith("__init__")}
    assert {room for room in rooms if not room.startswith(("engines.demo.", "server.api."))} == listed


@pytest.mark.parametrize("module", modules("engines"))
def test_engines_know_nothing_of_the_server(module: str) -> None:
    assert not {name for name in imports(module) if name.split(".")[0] == "server"}


@pytest.mark.parametrize("module", modules("server"))
def test_the_server_needs_nothing_of_the_build(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & ONLY_TO_BUILD
    assert not imports(module) & BUILDERS


@pytest.mark.parametrize("module", [name for name in modules("engines") if "demo" not in name])
def test_only_the_exporters_need_torch(module: str) -> None:
    if module not in EXPORTERS:
        assert not {name.split(".")[0] for name in imports(module)} & ONLY_TO_BUILD


@pytest.mark.parametrize(
    "module",
    [
        "server.batcher",
        "server.plan",
        "server.noise",
        *(name for name in SERVER if name.startswith("server.schedulers.")),
    ],
)
def test_policy_and_numbers_need_neither_device_nor_http(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & {
        "fastapi",
        "starlette",
        "onnxruntime",
        "openvino",
        "cuda",
    }


@pytest.mark.parametrize("module", [name for name in modules("engines") if name != "engines.openvino"])
def test_openvino_is_imported_in_one_place(module: str) -> None:
    """Which keeps it from sending statistics of its use."""
    assert not {name for name in imports(module) if name.split(".")[0] == "openvino"}


def test_a_running_server_loads_no_torch() -> None:
    """What the imports say, seen in a process: some library might pull it in by itself."""
    assert not loaded("server.app", "server.__main__") & {"torch", "onnx", "transformers", "diffusers"}


def test_what_the_engines_need_not_wait_for_is_imported_after_them() -> None:
    """They are loaded meanwhile; what is imported before they are is time that nothing else passes in."""
    assert not loaded("server.__main__") & {"fastapi", "onnxruntime", "openvino", "cuda", "uvicorn.protocols"}


def loaded(*names: str) -> set[str]:
    """What a process has loaded that imports the modules `names`."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())  # noqa: S603 - our own
