"""Bundles whose engines stray, from the command line to the layer."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

import build_engines
from engines.build.bisect.run import bisect
from engines.contract import GraphName
from engines.manifest import File, Manifest
from engines.progress import NullProgress

RTX = "tensorrt_rtx"


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def with_damage(manifest: Manifest, bundle: Path, graph: GraphName, *weights: str) -> Manifest:
    """The manifest with an engine of `onnxruntime` for `graph` that has other `weights`."""
    model, path = onnx.load(bundle / f"onnx/{graph}.onnx"), bundle / f"onnx/{graph}.engine.onnx"
    for weight in model.graph.initializer:
        if weight.name in weights:
            array = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(array * array.dtype.type(-8), weight.name))
    onnx.save(model, path)
    build = manifest.builds["onnxruntime"]
    engine = build.engines[graph].model_copy(update={"files": (File.of(path, root=bundle),)})
    altered = build.model_copy(update={"engines": {**build.engines, graph: engine}})
    return manifest.model_copy(update={"builds": {"onnxruntime": altered}})


@pytest.mark.parametrize(
    ("graph", "weight", "module"),
    [
        (
            "denoise",
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight.T",
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
        ),
        ("decode", "vae.decoder.conv_in.weight", "vae.decoder.conv_in"),
    ],
)
def test_the_module_of_a_damaged_weight_is_named(
    copied: Path, manifest: Manifest, graph: GraphName, weight: str, module: str
) -> None:
    before = sorted(copied.rglob("*"))
    altered = with_damage(manifest, copied, graph, weight)
    (finding,) = bisect(altered, copied, "onnxruntime", progress=NullProgress())
    assert finding.graph == graph
    assert finding.first is not None
    assert finding.first.scope == module
    assert {*copied.rglob("*")} - {*before} == {copied / f"onnx/{graph}.engine.onnx"}


def test_the_command_shows_the_layer_and_leaves_the_bundle_as_it_is(
    copied: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    with_damage(manifest, copied, "denoise", "unet.mid_block.resnets.0.conv1.weight").save(copied)
    saved = (copied / "manifest.json").read_bytes()
    assert build_engines.main(["verify", str(copied), "--bisect"]) == 0
    shown = "".join(capsys.readouterr().err.split())
    assert "first_at_Conv" in shown or "firstatConv" in shown
    assert "unet.mid_block.resnets.0.conv1" in shown
    assert (copied / "manifest.json").read_bytes() == saved


def test_nothing_diverges_where_all_engines_agree(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engines.main(["verify", str(bundle), "--bisect", "--backend", "onnxruntime"]) == 0
    assert "Nothing diverges" in capsys.readouterr().err


def test_a_missing_package_is_said_with_the_command_that_installs_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "engines.build.bisect.run":
            raise ModuleNotFoundError("No module named 'polygraphy'", name="polygraphy")
        return find(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert build_engines.main(["verify", str(bundle), "--bisect"]) == 1
    assert "--bisect needs the package polygraphy:" in capsys.readouterr().err
