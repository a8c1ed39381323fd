"""Finite values are a condition of verification: NaN in both of two images is no agreement."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.accuracy import IDENTICAL
from engines.build import verify as verification
from engines.build.trajectory import record
from engines.contract import GraphName
from engines.errors import EngineError
from engines.manifest import Manifest
from engines.progress import NullProgress


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def damage(path: Path, value: float) -> None:
    """Set the first large weight of the graph at `path` to `value`."""
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if np.prod(one.dims) >= 1024)
    array = np.full_like(numpy_helper.to_array(weight), value)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    path.unlink()
    path.with_suffix(".weights").unlink(missing_ok=True)
    onnx.save(model, path)


def check(manifest: Manifest, bundle: Path) -> float:
    build = verification.verify(manifest, bundle, "onnxruntime", progress=NullProgress())
    assert build.verification
    return build.verification.psnr


def test_the_same_graphs_draw_the_same_picture(bundle: Path, manifest: Manifest) -> None:
    assert check(manifest, bundle) == IDENTICAL


@pytest.mark.parametrize("graph", ["decode", "denoise", "encode_prompt"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_fail_with_the_graph_and_a_remedy(
    copied: Path, manifest: Manifest, graph: GraphName, value: float
) -> None:
    damage(copied / f"onnx/{graph}.onnx", value)
    with pytest.raises(verification.VerificationError, match=rf"{graph} computes no finite values .* NaN") as raised:
        check(manifest, copied)
    assert f"weights of {graph} in tiny-sd are damaged" in str(raised.value)
    assert "download the checkpoint again" in str(raised.value)
    assert str(raised.value).endswith("The bundle no longer lists onnxruntime.")


@pytest.mark.parametrize("graph", ["decode", "denoise"])
def test_an_engine_that_is_not_finite_where_the_graph_is_names_its_precision(
    copied: Path, manifest: Manifest, graph: GraphName
) -> None:
    """As FP16 that overflows: the reference is sound, and the remedy a wider type."""
    own = copied / f"onnx/{graph}.engine.onnx"
    onnx.save(onnx.load(copied / f"onnx/{graph}.onnx"), own)
    damage(own, np.inf)
    build = manifest.builds["onnxruntime"]
    file = build.engines[graph].files[0].model_copy(update={"path": f"onnx/{graph}.engine.onnx"})
    engine = build.engines[graph].model_copy(update={"files": (file,), "precision": "fp16"})
    altered = build.model_copy(update={"engines": {**build.engines, graph: engine}})
    with pytest.raises(verification.VerificationError, match=f"{graph} computes no finite values") as raised:
        check(manifest.model_copy(update={"builds": {"onnxruntime": altered}}), copied)
    assert "fp16 on onnxruntime does not hold what FP32 does; compile it with --precision bf16, or fp32" in str(
        raised.value
    )


def test_nothing_is_calibrated_on_values_that_are_not_finite(copied: Path, manifest: Manifest) -> None:
    damage(copied / "onnx/decode.onnx", np.nan)
    with pytest.raises(EngineError, match="decode computes no finite values"):
        record(manifest, copied, NullProgress())
