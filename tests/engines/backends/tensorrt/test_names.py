"""Every TensorRT name in the source exists in each supported version, so that a removal is noticed without a GPU.

TensorRT's objects have no types that mypy could check. So variables have fixed names: `config` or `self._config` in the
source is an IBuilderConfig, and every attribute used of it must exist in every version.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path

import pytest

from tests import ROOT
from tests.engines.backends import fake_tensorrt as fake

RTX = import_module("tensorrt_rtx")  # not by `import`: it has no types
ENGINES = ROOT / "engines"
BUILD = ENGINES / "build" / "trt"
RUNTIME = ENGINES / "backends" / "tensorrt"
SOURCES = sorted([*RUNTIME.glob("*.py"), *BUILD.glob("*.py")])
FOR_RTX = "rtx.py"  # runs over that package alone

# What each name stands for in the source, and what each method gives.
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "runtime_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
    "severity": "ILogger",
    "timing_cache": "ITimingCache",
}
RESULTS = {
    "create_builder_config": "IBuilderConfig",
    "create_engine_inspector": "EngineInspector",
    "create_execution_context": "IExecutionContext",
    "create_network": "INetworkDefinition",
    "create_runtime_cache": "IRuntimeCache",
    "create_runtime_config": "IRuntimeConfig",
    "create_timing_cache": "ITimingCache",
    "deserialize_cuda_engine": "ICudaEngine",
    "get_error": "ParserError",
    "get_input": "ITensor",
    "get_layer": "ILayer",
    "code": "ErrorCode",
}

Names = Mapping[str, list[str]]  # by class
Use = tuple[str, str]  # class, member; the member is empty where only the class is named


def recorded(version: str) -> Names:
    """The names of a TensorRT that is not installed, as they were read off its bindings."""
    names: Names = json.loads(Path(__file__).with_name(f"tensorrt-{version}.json").read_text())
    return names


def installed() -> Names:
    """The names of the TensorRT for RTX that is."""
    return {name: dir(kind) for name, kind in inspect.getmembers(RTX, inspect.isclass)}


def is_module(node: ast.expr) -> bool:
    """Whether `node` is the module handed in: `trt` or `self._trt`."""
    return isinstance(node, ast.Name | ast.Attribute) and word(node) == "trt"


def word(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr.lstrip("_")


def class_of(node: ast.expr) -> str | None:
    """The TensorRT class that `node` is, or is an instance of."""
    match node:
        case ast.Call(func=ast.Attribute(attr=method)) if method in RESULTS:
            return RESULTS[method]
        case ast.Call(func=called):
            return class_of(called) if isinstance(called, ast.Attribute) and is_module(called.value) else None
        case ast.Attribute(value=value, attr=name) if is_module(value):
            return name
        case ast.Name() | ast.Attribute(value=ast.Name()):
            return OBJECTS.get(word(node))
    return None


def uses(source: str) -> Iterator[Use]:
    """Every TensorRT class that `source` names, and every member that it takes from one or puts in its place."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=value, attr=name) if is_module(value) and not name.startswith("__"):
                yield name, ""
            case ast.Attribute(value=value, attr=name) if owner := class_of(value):
                yield owner, name
            case ast.Call(args=[ast.Attribute(value=value, attr=base)], keywords=methods) if is_module(value):
                yield from ((base, method.arg) for method in methods if method.arg)
            case ast.ClassDef(bases=[ast.Attribute(value=value, attr=base)], body=body) if is_module(value):
                own = [method.name for method in body if isinstance(method, ast.FunctionDef)]
                yield from ((base, name) for name in own if name in dir(getattr(RTX, base)))


def lacking(source: str, names: Names) -> list[Use]:
    """The uses in `source` of what `names` does not have. Functions of the module are not in the lists, nor here."""
    classes = {use for use in uses(source) if use[0][0].isupper()}
    return sorted(
        (owner, member)
        for owner, member in classes
        if owner not in names or (member and member not in names[owner] and not member.startswith("__"))
    )


def test_the_sources_are_found_and_say_much() -> None:
    assert {"builder.py", "log.py"} <= {path.name for path in SOURCES}
    found = {use for path in BUILD.glob("*.py") for use in uses(path.read_text())}
    assert {
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("IProgressMonitor", "step_complete"),
        ("ILogger", "log"),
        ("ILogger", "ERROR"),
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "max_aux_streams"),
        ("IBuilderConfig", "builder_optimization_level"),
        ("IBuilderConfig", "create_timing_cache"),
        ("ITimingCache", "serialize"),
        ("TilingOptimizationLevel", "FULL"),
        ("IOptimizationProfile", "set_shape"),
        ("OnnxParser", "parse_from_file"),
        ("ParserError", "node_operator"),
        ("ErrorCode", "name"),
        ("INetworkDefinition", "get_layer"),
        ("ILayer", "get_input"),
        ("ITensor", "shape"),
        ("LayerType", "SOFTMAX"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "get_device_memory_size_for_profile_v2"),
        ("EngineInspector", "get_engine_information"),
        ("LayerInformationFormat", "JSON"),
    } <= found


def test_what_only_the_runtime_needs_is_found_too() -> None:
    found = {use for path in RUNTIME.glob("*.py") for use in uses(path.read_text())}
    assert {
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_device_memory"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("Runtime", "deserialize_cuda_engine"),
    } <= found


def test_rtx_uses_what_the_others_lack() -> None:
    source = (RUNTIME / FOR_RTX).read_text()
    only = {
        ("CudaGraphStrategy", "DISABLED"),
        ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
        ("IExecutionContext", "is_stream_capturable"),
        ("IRuntimeCache", "deserialize"),
        ("IRuntimeCache", "serialize"),
        ("IRuntimeConfig", "create_runtime_cache"),
        ("IRuntimeConfig", "set_runtime_cache"),
    }
    assert only <= set(uses(source)) & set(lacking(source, recorded("11.4")))


@pytest.mark.parametrize(
    ("path", "version"),
    [
        (path, version)
        for path in SOURCES
        for version in ("10.16", "11.4", "RTX")
        if version == "RTX" or path.name != FOR_RTX
    ],
    ids=lambda one: one.name if isinstance(one, Path) else one,
)
def test_every_name_is_there(path: Path, version: str) -> None:
    names = installed() if version == "RTX" else recorded(version)
    assert lacking(path.read_text(), names) == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("trt.BuilderFlag.FP16", ("BuilderFlag", "FP16")),
        ("config.set_flag(self._trt.BuilderFlag.FP16)", ("BuilderFlag", "FP16")),
        ("engine.device_memory_size", ("ICudaEngine", "device_memory_size")),
        ("self._runtime.deserialize_cuda_engine(plan).device_memory_size", ("ICudaEngine", "device_memory_size")),
        ("layer.precision = 0", ("ILayer", "precision")),
        ("config.int8_calibrator = None", ("IBuilderConfig", "int8_calibrator")),
        ("trt.IInt8Calibrator", ("IInt8Calibrator", "")),
    ],
)
def test_what_version_11_took_away_would_be_noticed(source: str, missing: Use) -> None:
    assert lacking(source, recorded("10.16")) == []
    assert lacking(source, recorded("11.4")) == [missing]
    assert lacking(source, installed()) == [missing]


def test_what_only_rtx_has_would_be_noticed_elsewhere() -> None:
    source = "context.is_stream_capturable(stream)"
    assert lacking(source, installed()) == []
    assert lacking(source, recorded("11.4")) == [("IExecutionContext", "is_stream_capturable")]


def test_a_misspelt_override_would_be_noticed() -> None:
    source = "_subclass(trt.IProgressMonitor, step_complete=f, phase_begin=f)"
    assert lacking(source, recorded("11.4")) == [("IProgressMonitor", "phase_begin")]


def test_only_rtx_has_the_name_by_which_it_is_recognised() -> None:
    assert "ComputeCapability" in installed()
    assert "ComputeCapability" not in [*recorded("10.16"), *recorded("11.4")]


# The fake's functions take what the real ones take, so what runs over it passes the right arguments.


def signatures(owner: str, member: str) -> set[tuple[str, ...]]:
    """The names of the parameters of each overload, as pybind11 documents them in its first lines."""
    text = getattr(getattr(RTX, owner), member).__doc__ or ""
    lines = [line for line in text.splitlines() if re.match(rf"(\d+\. )?{member}\(", line.strip())]
    return {tuple(name for name in re.findall(r"[(,] ?(\w+): ", line) if name != "self") for line in lines}


def offered() -> list[tuple[str, str, tuple[str, ...]]]:
    """Class, function and parameters of all that the fakes offer."""
    kinds = [(name, getattr(fake, name, fake.RTX_NAMES.get(name))) for name in {*fake.__all__, *fake.RTX_NAMES}]
    kinds += list(fake.RTX_NAMES.items())
    return sorted(
        {
            (name, member, tuple(inspect.signature(function).parameters)[1:])
            for name, kind in kinds
            if inspect.isclass(kind) and not issubclass(kind, Enum)
            for member, function in inspect.getmembers(kind, inspect.isfunction)
            if not member.startswith("_")
        }
    )


def test_the_fake_offers_much() -> None:
    assert ("IExecutionContext", "set_device_memory", ("memory", "size")) in offered()
    assert ("IRuntimeCache", "deserialize", ("blob",)) in offered()


@pytest.mark.parametrize(("owner", "member", "parameters"), offered())
def test_the_fake_takes_the_real_parameters(owner: str, member: str, parameters: tuple[str, ...]) -> None:
    assert parameters in signatures(owner, member)
