"""What a build keeps is named by all that decides it: any edit of that code gives a new key, and no other edit does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engines.build import keys
from engines.build.keys import (
    EXPORT_CODE,
    INT8_CODE,
    ONNXRUNTIME_CUDA_CODE,
    QDQ_CODE,
    TENSORRT_CODE,
    engine_key,
    export_key,
    quantized_key,
)
from engines.contract import GraphName
from engines.manifest import Manifest, Precision, Size
from tests import ROOT

ENGINES = ROOT / "engines"
IRRELEVANT = (
    "build/console.py",
    "build/outline.py",
    "build/tables.py",
    "progress.py",
    "backends/cuda/status.py",
    "demo/train.py",
)


def modules(places: Iterable[str]) -> list[str]:
    """Every module of the folders among `places`, by its path in the package."""
    found = (sorted(path.rglob("*.py")) if (path := ENGINES / place).is_dir() else [path] for place in places)
    return [file.relative_to(ENGINES).as_posix() for files in found for file in files]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read(ENGINES / "demo")


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, which keys are made of."""
    copy = Path(shutil.copytree(ENGINES, tmp_path / "engines", ignore=shutil.ignore_patterns("*.onnx", "*.weights")))
    monkeypatch.setattr(keys, "ENGINES", copy)
    return copy


def edit(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")


def export(manifest: Manifest) -> str:
    return export_key(manifest.source, manifest.weights, manifest.versions)


def engine(manifest: Manifest, backend: str, graph: GraphName = "denoise", *, precision: Precision = "fp16") -> str:
    onnx = manifest.graphs[graph].onnx["fp32"]
    return engine_key(manifest, graph, onnx, backend=backend, version="1", gpu=None, precision=precision)


def tensorrt(manifest: Manifest) -> str:
    return engine(manifest, "tensorrt")


def int8(manifest: Manifest) -> str:
    return engine(manifest, "openvino", precision="int8")


def onnxruntime_cuda(manifest: Manifest) -> str:
    return engine(manifest, "onnxruntime_cuda")


def fp8_graph(manifest: Manifest, modelopt: str = "0.47.0") -> str:
    return quantized_key(manifest, manifest.graphs["denoise"].onnx["fp32"], "fp8", modelopt=modelopt)


KEYS = {
    export: EXPORT_CODE,
    tensorrt: TENSORRT_CODE,
    int8: INT8_CODE,
    onnxruntime_cuda: ONNXRUNTIME_CUDA_CODE,
    fp8_graph: QDQ_CODE,
}


@pytest.mark.parametrize(("key", "module"), [(key, module) for key in KEYS for module in modules(KEYS[key])])
def test_every_module_that_decides_an_artefact_changes_its_key(
    manifest: Manifest, code: Path, key: Callable[[Manifest], str], module: str
) -> None:
    before = key(manifest)
    assert key(manifest) == before
    edit(code / module)
    assert key(manifest) != before


@pytest.mark.parametrize("module", IRRELEVANT)
def test_other_modules_change_no_key(manifest: Manifest, code: Path, module: str) -> None:
    before = [key(manifest) for key in KEYS]
    edit(code / module)
    assert [key(manifest) for key in KEYS] == before


def test_lanes_of_memory_are_another_export(manifest: Manifest, code: Path) -> None:
    before, contract = export(manifest), code / "contract.py"
    text = contract.read_text(encoding="utf-8")
    assert "\nMEMORY = 3 " in text
    contract.write_text(text.replace("\nMEMORY = 3 ", "\nMEMORY = 4 "), encoding="utf-8")
    assert export(manifest) != before


def test_code_is_listed_that_exists() -> None:
    assert not [place for places in KEYS.values() for place in places if not (ENGINES / place).exists()]


def test_an_export_is_of_one_source_storage_and_version(manifest: Manifest) -> None:
    other = manifest.source.model_copy(update={"sha256": "0" * 64})
    versions = {**manifest.versions, "torch": "0"}
    made = [
        export(manifest),
        export_key(other, manifest.weights, manifest.versions),
        export_key(manifest.source, "fp32", manifest.versions),
        export_key(manifest.source, manifest.weights, versions),
    ]
    assert len(set(made)) == len(made)
    names = {"name": "renamed", "loras": ("renamed:1.0",), "embeddings": ("renamed:<word>",), "decoder": "renamed"}
    renamed = manifest.source.model_copy(update={**names, "file_sha256": "0" * 64})
    assert export_key(renamed, manifest.weights, manifest.versions) == made[0]


def test_tensorrt_engines_are_of_their_profiles_and_of_no_trajectory(manifest: Manifest) -> None:
    assert tensorrt(manifest.model_copy(update={"rows": (2, 4)})) != tensorrt(manifest)
    assert tensorrt(manifest.model_copy(update={"examples": ("a boat",)})) == tensorrt(manifest)


def test_a_level_is_another_tensorrt_engine(manifest: Manifest) -> None:
    onnx = manifest.graphs["denoise"].onnx["fp32"]
    made = {
        engine_key(
            manifest,
            "denoise",
            onnx,
            backend="tensorrt",
            version="1",
            gpu=None,
            precision="fp16",
            optimization_level=level,
        )
        for level in range(6)
    }
    assert len(made) == 6


def test_int8_engines_are_of_the_trajectories_they_were_calibrated_on(manifest: Manifest) -> None:
    """The text encoder's too: prompts are part of a trajectory."""
    changes: dict[str, object] = {
        "examples": ("a boat",),
        "resolutions": (Size(width=48, height=32),),
        "defaults": manifest.defaults.model_copy(update={"scheduler": "ddim"}),
        "noise_schedule": manifest.noise_schedule.model_copy(update={"num_train_timesteps": 500}),
        "graphs": {**manifest.graphs, "encode_prompt": manifest.graphs["decode"]},
    }
    for field, value in changes.items():
        for key in (int8, fp8_graph):
            assert key(manifest.model_copy(update={field: value})) != key(manifest), field
    for key in (int8, fp8_graph):
        assert key(manifest.model_copy(update={"name": "another"})) == key(manifest)


def test_an_engine_in_fp8_is_of_its_graph_and_a_graph_of_modelopts_version(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph serves all rows, so that others need no new calibration."""
    assert fp8_graph(manifest, "0.48.0") != fp8_graph(manifest)
    assert fp8_graph(manifest.model_copy(update={"rows": (2, 4)})) == fp8_graph(manifest)

    def fp8(version: str) -> str:
        monkeypatch.setattr(keys, "modelopt_version", lambda: version)
        return engine(manifest, "tensorrt", precision="fp8")

    assert fp8("0.47.0") == fp8("0.47.0") != fp8("0.48.0")
    assert fp8("0.47.0") != tensorrt(manifest)
