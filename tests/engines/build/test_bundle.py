"""One bundle for several backends: ONNX is stored once, and a second build does only what changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import build_engines
from engines.accuracy import psnr
from engines.backends.openvino.package import openvino
from engines.contract import GRAPHS
from engines.manifest import Build, File, Manifest
from engines.step_cache import DEMO_DRIFT
from tests import ROOT
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures


def build(*arguments: object) -> int:
    return build_engines.main([str(argument) for argument in arguments])


def state_of(bundle: Path) -> dict[Path, int]:
    """Every file and when it was last written."""
    return {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()}


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="module")
def several(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's bundle with the engines of a second backend."""
    out = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("several") / "copy"))
    assert build("compile", out, "--backend", "openvino") == 0
    return out


@pytest.fixture(scope="module")
def in_bf16(checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's bundle with graphs and engines in BF16."""
    out = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("bf16") / "copy"))
    Manifest.load(out).model_copy(update={"feature_drift": DEMO_DRIFT}).save(out)
    source = ["--model", checkpoint, "--out", out, "--resolution", "32x32"]
    assert build(*source, "--backend", "openvino", "--precision", "bf16") == 0
    return out


def test_backends_share_the_graphs(several: Path) -> None:
    manifest = Manifest.load(several)
    assert list(manifest.builds) == ["onnxruntime", "openvino"]
    for name in GRAPHS:
        files = {build.engines[name].files for build in manifest.builds.values()}
        assert files == {manifest.graphs[name].onnx["fp32"].files}
    assert len(list(several.rglob("*.onnx"))) == len(list(several.rglob("*.weights"))) == 5


def test_verification_found_the_same_picture(several: Path) -> None:
    manifest = Manifest.load(several)
    for backend, found in manifest.builds.items():
        assert found.verification is not None, backend
        assert found.verification.psnr >= 60
        for name, engine in found.engines.items():
            assert engine.difference is not None
            assert engine.difference.largest < (2 / 255 if name == "decode" else 1e-3)  # rounding to the next level


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_served_is_diffusers_picture(checkpoint: Path, several: Path, backend: str) -> None:
    body = {"prompt": "two old boats", "num_inference_steps": 12}
    theirs = draw(load_pipeline(checkpoint), scheduler="dpmpp_2m", seed=3, **body)
    with Serving(several, "--backend", backend) as serving:
        ours = pictures(serving.generate(**body, seed=3, scheduler="dpmpp_2m"))[0]
    assert psnr(ours, theirs) >= 40


def test_a_second_build_changes_nothing_and_needs_no_torch(checkpoint: Path, several: Path) -> None:
    before = state_of(several)
    arguments = ["--model", str(checkpoint), "--out", str(several), "--rows", "2,4,8"]
    arguments += ["--resolution", "32x32", "48x32", "--backend", "onnxruntime", "--backend", "openvino"]
    code = f"import sys, build_engines as b; code = b.main({arguments}); sys.exit(code or 3 * ('torch' in sys.modules))"
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert again.returncode == 0, again.stderr
    assert "the graphs: unchanged" in again.stderr
    after = state_of(several)
    assert {path for path in before if before[path] != after.get(path)} <= {several / "manifest.json"}
    assert Manifest.load(several).builds["openvino"].verification


def test_a_checkpoint_of_another_name_needs_no_export(
    checkpoint: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(copied / "onnx")
    renamed = shutil.copytree(checkpoint, tmp_path / "renamed-sd")
    assert build("--model", renamed, "--out", copied, "--backend", "onnxruntime", "--rows", "2", "--no-verify") == 0
    assert "the graphs: unchanged" in capsys.readouterr().err
    manifest = Manifest.load(copied)
    assert (manifest.name, manifest.source.name) == ("renamed-sd", "renamed-sd")
    assert state_of(copied / "onnx") == before


def test_other_shapes_need_no_export(copied: Path) -> None:
    before = state_of(copied / "onnx")
    assert (
        build("compile", copied, "--backend", "onnxruntime", "--resolution", "64x32", "--rows", "4", "--no-verify") == 0
    )
    manifest = Manifest.load(copied)
    assert [str(size) for size in manifest.resolutions] == ["64x32"]
    assert manifest.rows == (4,)
    assert state_of(copied / "onnx") == before


def test_a_size_that_does_not_fit_leaves_the_bundle_as_it_was(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(copied)
    assert build("compile", copied, "--backend", "onnxruntime", "--resolution", "33x32") == 1
    assert "multiples of 4" in capsys.readouterr().err
    assert state_of(copied) == before


def test_a_damaged_graph_is_not_compiled(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = copied / "onnx/encode_prompt.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    assert build("compile", copied, "--backend", "openvino") == 1
    assert re.search(r"encode_prompt\.onnx has \d+ bytes, and \d+ were built", capsys.readouterr().err)


def test_graphs_in_a_precision_that_is_missing_are_asked_for(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("compile", copied, "--backend", "tensorrt_rtx") == 1
    assert "export --backend tensorrt_rtx" in capsys.readouterr().err


def test_int8_halves_the_unet_and_keeps_the_picture(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("compile", copied, "--backend", "openvino", "--precision", "int8", "--resolution", "32x32") == 0
    manifest = Manifest.load(copied)
    made = manifest.builds["openvino"]
    assert made.precision == "int8"
    assert {engine.precision for engine in made.engines.values()} == {"int8"}
    assert made.verification
    assert made.verification.psnr >= 25
    assert build("compile", copied, "--backend", "openvino", "--precision", "int8") == 0
    assert capsys.readouterr().err.count("of openvino: unchanged") == len(GRAPHS)
    with Serving(copied, "--backend", "openvino") as serving:
        assert serving.client.get("/models").json()[0]["precision"] == "int8"
        assert serving.generate(prompt="two old boats", seed=3, num_inference_steps=4).status_code == 200


def test_another_precision_keeps_what_was_measured_of_the_model(in_bf16: Path) -> None:
    assert Manifest.load(in_bf16).feature_drift == DEMO_DRIFT


def test_bf16_on_a_cpu_keeps_the_picture(in_bf16: Path) -> None:
    """Processors without BF16 compute the same graphs in FP32."""
    made = Manifest.load(in_bf16).builds["openvino"]
    chosen = {name: engine.precision for name, engine in made.engines.items()}
    assert chosen == {name: "fp32" if name.startswith("encode") else "bf16" for name in GRAPHS}
    assert made.verification
    assert made.verification.psnr >= 35
    # As on a processor without BF16, where compiling drops casts, and the names of a graph's outputs with them.
    verify = [sys.executable, str(ROOT / "build_engines.py"), "verify", str(in_bf16)]
    subprocess.run(verify, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)  # noqa: S603 - our own
    with Serving(in_bf16, "--backend", "openvino") as serving:
        assert serving.client.get("/models").json()[0]["precision"] == "bf16"
        fast = {"prompt": "two old boats", "seed": 3, "num_inference_steps": 5, "cache": "fast"}
        assert serving.generate(**fast).status_code == 200


def test_a_graph_in_bf16_keeps_its_own_arithmetic_and_the_timestep_in_fp32(in_bf16: Path) -> None:
    """In eight bits of mantissa 999 is 1000, and a scheduler's table a rough one."""
    compiled = openvino.Core().compile_model(
        in_bf16 / "onnx" / "denoise.bf16.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    runs = {(one["layerType"].value, one["runtimePrecision"].value) for one in facts}
    exact = {precision for kind, precision in runs if kind in ("MatMul", "Math")}
    assert exact == {"f32"}


def test_auto_says_what_it_chose_and_why(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("compile", copied, "--no-verify") == 0
    output = capsys.readouterr().err
    assert "backend openvino (no usable NVIDIA GPU)" in output or "backend tensorrt" in output


def test_inspect_shows_the_bundle(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("inspect", several) == 0
    shown = capsys.readouterr().err
    for word in ("denoise.onnx", "openvino", "verified against FP32", "stored in fp32", "of the device's memory"):
        assert word in shown


def test_verification_refuses_an_engine_that_computes_something_else(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph of other weights, under a manifest that vouches for it."""
    path = copied / "onnx/denoise.weights"
    content = np.frombuffer(path.read_bytes(), np.float32).copy()
    (copied / "onnx/wrong.weights").write_bytes((content * 1.5).tobytes())
    model = onnx.load(copied / "onnx/denoise.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            entry.value = "wrong.weights" if entry.key == "location" else entry.value
    onnx.save(model, copied / "onnx/wrong.onnx")
    manifest = Manifest.load(copied)
    made = manifest.builds["onnxruntime"]
    wrong = tuple(File.of(copied / "onnx" / name, root=copied) for name in ("wrong.onnx", "wrong.weights"))
    engines = {**made.engines, "denoise": made.engines["denoise"].model_copy(update={"files": wrong})}
    Manifest(**{**dict(manifest), "builds": {"onnxruntime": Build(version=made.version, engines=engines)}}).save(copied)
    assert build("verify", copied) == 1
    assert "denoise of onnxruntime differs from the FP32 graph" in capsys.readouterr().err
    assert "onnxruntime" not in Manifest.load(copied).builds


def test_a_model_beyond_fp16_is_refused_by_name(
    checkpoint: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queries and keys beyond 65504: FP32 holds them, FP16 does not. Seen before anything is written."""
    before = state_of(copied)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "loud"))
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            weights[name] = weights[name] * 100_000
    save_file({name: weight.clone() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    common = ["--model", folder, "--out", copied, "--resolution", "32x32"]
    assert build("export", *common, "--precision", "fp16") == 1
    output = capsys.readouterr().err
    assert "FP16 ends at 65504" in output
    assert "--precision bf16" in output
    assert state_of(copied) == before
