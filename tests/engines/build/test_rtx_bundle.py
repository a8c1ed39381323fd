"""TensorRT for RTX builds real engines on any machine: what the command makes of a whole checkpoint, and keeps."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

import build_engines
from engines.backends import available
from engines.backends.cuda import Probe, probe
from engines.backends.registry import ON_CPU, install_command
from engines.build import api, trajectory
from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.build.profiles import shapes
from engines.build.trt.parent import build_engine
from engines.contract import GRAPHS, PLAIN_STEPS, GraphName
from engines.errors import EngineError
from engines.manifest import MANIFEST, BundleError, FusionReport, Gpu, Manifest
from engines.progress import NullProgress
from tests import ROOT
from tests.support.serving import Serving, pictures, run_server
from tests.support.tiny import make_checkpoint

without_gpu = pytest.mark.skipif(probe().gpu is not None, reason="a GPU is here, and would run the engines")


def build(*arguments: object) -> int:
    return build_engines.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose attention heads are as wide as real ones."""
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "wide-sd", "wide")


@pytest.fixture(scope="module")
def built(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtx")
    sizes = ["--resolution", "32x32", "--resolution", "48x32", "--rows", "2,4"]
    assert build("--model", wide, "--out", out, "--backend", "tensorrt_rtx", *sizes) == 0
    return out


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_the_manifest_tells_of_every_engine(built: Path) -> None:
    manifest = Manifest.load(built)
    made = manifest.builds["tensorrt_rtx"]
    assert manifest.weights == "fp16"
    assert {engine.precision for engine in made.engines.values()} == {"fp16"}
    for engine in made.engines.values():
        (file,) = engine.files
        assert (built / file.path).stat().st_size == file.size > 100_000
        assert engine.seconds > 0
        assert engine.memory > 100e6
    profiles = [(str(one.size), one.batch) for one in made.engines["denoise"].profiles]
    assert profiles == [("32x32", 2), ("32x32", 4), ("48x32", 2), ("48x32", 4)]
    activations = [one.activations or 0 for one in made.engines["denoise"].profiles]
    assert 0 < activations[0] < activations[1]
    assert 0 < activations[2] < activations[3]


@pytest.mark.parametrize(("name", "attentions"), [("encode_prompt", 2), ("denoise", 8), ("denoise_shallow", 2)])
def test_its_graphs_in_fp16_are_rewritten_for_onnxruntime_on_gpus(
    copied: Path, name: GraphName, attentions: int
) -> None:
    """Compared with them in FP32, which shows that nothing but the operators has changed."""
    manifest = Manifest.read(copied)
    exported = copied / manifest.graphs[name].onnx["fp16"].files[0].path
    made = exported.with_suffix(".cuda.onnx")
    counts = rewrite(exported, made)
    assert counts.attentions == (attentions, attentions)
    assert counts.transposes == (0 if name == "encode_prompt" else 3)
    assert check_same(name, manifest, exported, made).largest < 1e-5


def test_precisions_share_the_weights(built: Path) -> None:
    """Each large weight lies on disk once, in FP16; both graphs read it, the FP32 one through a cast."""
    for name, graph in Manifest.load(built).graphs.items():
        half, full = graph.onnx["fp16"], graph.onnx["fp32"]
        assert half.files[1] == full.files[1]
        assert 0 < half.difference.largest < 2e-2, name
        typed = onnx.load(built / half.files[0].path, load_external_data=False).graph
        large = [weight for weight in typed.initializer if np.prod(weight.dims) >= 1024 and len(weight.dims) > 1]
        assert large
        assert {weight.data_location for weight in large} == {onnx.TensorProto.EXTERNAL}
        assert {weight.data_type for weight in large} == {onnx.TensorProto.FLOAT16}
    assert len(list(built.rglob("*.onnx"))) == 10
    assert len(list(built.rglob("*.weights"))) == 5


def test_every_attention_and_group_norm_of_the_unet_is_fused(built: Path) -> None:
    """In every profile: gathering and scattering around the UNet costs no fusion."""
    layers = Manifest.load(built).builds["tensorrt_rtx"].engines["denoise"].layers
    assert layers is not None
    assert (layers.fused_attentions, layers.fused_group_norms) == (layers.attentions, layers.group_norms)
    assert layers.attentions == 8
    assert layers.group_norms > 15
    assert layers.precisions["Half"] > layers.precisions["Float"]


def test_the_graph_that_applies_loras_keeps_every_fusion(wide: Path, copied: Path, tmp_path: Path) -> None:
    """In FP16, whatever the ranks of a row. Its engine takes ten times as long to compile: one profile is enough."""
    options = api.ExportOptions(rows=(2,), lora=api.LoraCapacity(slots=4, rank=8))
    manifest = api.export(api.CheckpointSource(str(wide)), copied, backends=["tensorrt_rtx"], options=options)
    graph, (profile, *_) = manifest.graphs["denoise_lora"], shapes(manifest, "denoise_lora")
    exported = copied / graph.onnx["fp16"].files[0].path
    ranges = [{spec.name: profile.of(spec) for spec in graph.inputs}]
    report = build_engine("tensorrt_rtx", exported, tmp_path / "made.engine", ranges, progress=NullProgress())
    assert report.layers is not None
    layers = FusionReport.model_validate(report.layers)
    assert (layers.fused_attentions, layers.fused_group_norms) == (layers.attentions, layers.group_norms) == (8, 21)
    assert layers.precisions["Half"] > 10 * layers.precisions["Float"]


@pytest.mark.skipif(find_spec("modelopt") is None, reason="ModelOpt is not installed: extra quantize")
def test_fp8_keeps_every_fusion_and_shares_the_weights(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text encoder and the decoder stay what they were, and other rows need no new calibration."""
    monkeypatch.setattr(trajectory, "CALIBRATION_STEPS", 4)  # more make better ranges, and no other layers
    before = Manifest.load(copied).builds["tensorrt_rtx"].engines
    words = ["compile", copied, "--backend", "tensorrt_rtx", "--precision", "fp8", "--no-verify"]
    assert build(*words, "--resolution", "32x32", "--rows", "2") == 0
    engines = Manifest.load(copied).builds["tensorrt_rtx"].engines
    assert {name for name, engine in engines.items() if engine.precision == "fp8"} == set(PLAIN_STEPS)
    made, was = engines["denoise"].layers, before["denoise"].layers
    assert made is not None
    assert was is not None
    assert made.precisions["FP8"] > 10
    assert (made.fused_attentions, made.fused_group_norms) == (was.fused_attentions, was.fused_group_norms)
    assert engines["denoise"].quantization
    assert len(list(copied.rglob("*.weights"))) == 5
    assert "error of 8 bits" in capsys.readouterr().err
    assert build(*words, "--resolution", "32x32", "--rows", "4") == 0
    said = capsys.readouterr().err
    assert "encode_prompt of tensorrt_rtx: unchanged" in said
    assert "quantizing denoise to fp8: " not in said


@without_gpu
def test_without_a_gpu_engines_are_not_yet_verified(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Manifest.load(built).builds["tensorrt_rtx"].verification is None
    assert build("inspect", built) == 0
    shown = capsys.readouterr().err
    assert "not yet verified: run build_engines.py verify" in shown
    assert "8 of 8" in shown
    assert build("verify", built) == 0
    assert "cannot run here" in capsys.readouterr().err
    assert build("verify", built, "--backend", "tensorrt_rtx") == 1
    assert "tensorrt_rtx cannot be verified here" in capsys.readouterr().err


def test_a_second_build_rebuilds_nothing(wide: Path, built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.name != MANIFEST}
    arguments = ["--model", str(wide), "--out", str(built), "--backend", "tensorrt_rtx", "--rows", "2,4"]
    arguments += ["--resolution", "32x32", "--resolution", "48x32"]
    code = f"import sys, build_engines as b; code = b.main({arguments}); sys.exit(code or 3 * ('torch' in sys.modules))"
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("unchanged") == 1 + len(GRAPHS)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.name != MANIFEST} == before


def test_another_row_bucket_compiles_the_denoising_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("compile", copied, "--backend", "tensorrt_rtx", "--rows", "2", "--resolution", "32x32") == 0
    output = capsys.readouterr().err
    assert "encode_prompt of tensorrt_rtx: unchanged" in output
    assert "denoise of tensorrt_rtx: unchanged" not in output
    engine = Manifest.load(copied).builds["tensorrt_rtx"].engines["denoise"]
    assert [profile.batch for profile in engine.profiles] == [2]


def test_new_shapes_for_one_backend_drop_the_engines_of_others(copied: Path) -> None:
    """Rather than leave a manifest that promises rows for which there is no profile."""
    assert build("compile", copied, "--backend", "onnxruntime", "--rows", "2,8", "--no-verify") == 0
    assert list(Manifest.load(copied).builds) == ["onnxruntime"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "removed"])
def test_a_damaged_engine_is_refused(copied: Path, damage: str) -> None:
    path, other = (copied / "engines/tensorrt_rtx" / name for name in ("encode_prompt.engine", "decode.engine"))
    content = path.read_bytes()
    match damage:
        case "flipped":
            path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
        case "truncated":
            path.write_bytes(content[:-1])
        case "swapped":
            path.write_bytes(other.read_bytes())
        case "removed":
            path.unlink()
    with pytest.raises(BundleError, match=r"encode_prompt\.engine"):
        Manifest.load(copied)
    server = run_server("--bundle", str(copied), "--port", "0")
    assert server.returncode == 1
    assert "encode_prompt.engine" in server.stderr


def test_a_damaged_engine_alone_is_compiled_again(wide: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "engines/tensorrt_rtx/encode_prompt.engine"
    path.write_bytes(path.read_bytes()[:-1])
    sizes = ["--resolution", "32x32", "--resolution", "48x32", "--rows", "2,4"]
    assert build("--model", wide, "--out", copied, "--backend", "tensorrt_rtx", *sizes) == 0
    output = capsys.readouterr().err
    assert "the graphs: unchanged" in output
    assert output.count("of tensorrt_rtx: unchanged") == 4
    assert Manifest.load(copied).builds["tensorrt_rtx"]


@without_gpu
def test_the_bundle_is_served_on_a_cpu_where_there_is_no_gpu(built: Path) -> None:
    with Serving(built) as serving:
        assert serving.client.get("/models").json()[0]["backend"] in ON_CPU
        assert pictures(serving.generate(prompt="two old boats", num_inference_steps=2, seed=1))[0].shape == (32, 32, 3)
    assert any("tensorrt_rtx is unavailable" in line for line in serving.stderr)


@without_gpu
def test_engines_without_their_gpu_are_told_before_loading(built: Path) -> None:
    ended = run_server("--bundle", str(built), "--backend", "tensorrt_rtx", "--port", "0")
    assert ended.returncode == 1
    assert "need an NVIDIA GPU, and this machine has none" in ended.stderr
    assert "use the backend onnxruntime or openvino" in ended.stderr


def test_engines_of_another_version_are_told_with_the_command_that_rebuilds(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((copied / MANIFEST).read_text())
    facts["builds"]["tensorrt_rtx"]["version"] = "1.6.0.1"
    (copied / MANIFEST).write_text(json.dumps(facts))
    monkeypatch.setattr(available, "probe", lambda: Probe(Gpu(name="NVIDIA L4", compute_capability="8.9")))
    with pytest.raises(EngineError, match=r"built by TensorRT for RTX 1\.6\.0.*compile .* --backend tensorrt_rtx"):
        available.check_fits(Manifest.load(copied), "tensorrt_rtx", copied)


def test_ctrl_c_leaves_what_was_there(copied: Path) -> None:
    before = {path: path.read_bytes() for path in (copied / "engines").rglob("*") if path.is_file()}
    command = [sys.executable, "build_engines.py", "compile", str(copied), "--backend", "tensorrt_rtx", "--force"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        assert process.stderr is not None
        output = ""
        while not re.search(r"compiling encode_prompt for tensorrt_rtx", output):
            output += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output += process.stderr.read()
    assert process.returncode == 130, output
    assert "cancelled" in output
    assert not [path for path in copied.rglob("*") if ".tmp" in path.name]
    Manifest.load(copied)
    assert {path: path.read_bytes() for path in (copied / "engines").rglob("*") if path.is_file()} == before


def test_tensorrt_itself_asks_for_its_package_or_its_gpu(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if build("compile", copied, "--backend", "tensorrt") == 0:
        pytest.skip("TensorRT and a GPU are here")
    output = capsys.readouterr().err
    assert install_command("cuda") in output or "GPU" in output
