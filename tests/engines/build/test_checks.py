"""What cannot be built is refused before anything is downloaded, read or exported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import build_engines
from engines.backends.cuda import Probe
from engines.build import api, checks
from engines.build.checks import check_compilers, check_options, check_out
from engines.build.qdq import quantize as quantizing
from engines.build.qdq.quantize import EIGHT_BITS
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.find import find_checkpoint
from engines.errors import EngineError
from engines.manifest import Gpu, Size
from tests.support.checkpoints import edit

SPARE = api.ExportOptions(rows=(2,))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a build from a checkpoint, or from what `model` says, and return why it was refused, in one line."""

    def refused(model: Path | str, *words: str, code: int = 1, out: Path = tmp_path / "out") -> str:
        try:
            ended = build_engines.main(["--model", str(model), "--out", str(out), "--backend", "onnxruntime", *words])
        except SystemExit as ending:
            ended = int(str(ending.code))
        assert ended == code
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line.removeprefix("error: ")

    return refused


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", "-1"], "--steps: Input should be greater than or equal to 1"),
        (["--steps", "0"], "--steps: Input should be greater than or equal to 1"),
        (["--steps", "100000"], "--steps: Input should be less than or equal to 200"),
        (["--guidance", "nan"], "--guidance: Input should be a finite number"),
        (["--guidance", "-5"], "--guidance: Input should be greater than or equal to 0"),
        (["--guidance", "1e9"], "--guidance: Input should be less than or equal to 50"),
        (["--name", ""], "--name: a name has 1 to 200 printable characters"),
        (["--name", "a" * 300], "--name: a name has 1 to 200 printable characters"),
        (["--name", "a\nb"], "--name: a name has 1 to 200 printable characters"),
        (["--example", "a" * 4001], "--example: a prompt has 1 to 4000 characters"),
        (["--example", ""], "--example: a prompt has 1 to 4000 characters"),
        (["--resolution", "8200x64"], "--resolution: '8200x64' is not a size that can be served: sides have 8 to 8192"),
        (["--resolution", "64x0"], "--resolution: '64x0' is not a size that can be served: sides have 8 to 8192"),
        (["--rows", "2000"], "--rows: '2000' is not a list of row counts from 1 to 1024"),
        (["--decode-batch", "0"], "--decode-batch: '0' is not a count: write 1 to 99"),
        (["--backend", "tensortr"], "--backend: there is no backend 'tensortr': did you mean tensorrt?"),
        (["--preset", "lightening-4"], "--preset: there is no preset 'lightening-4': did you mean lightning-4?"),
        (["--scheduler", "newton"], "--scheduler: unknown scheduler 'newton': choose one of ddim"),
        (["--timestep-spacing", "even"], "--timestep-spacing: "),
        (["--eta", "2"], "--eta: "),
        (["--variant", "../x"], "--variant: '../x' is not a variant"),
        (["--stpes", "3"], "there is no flag --stpes: did you mean --steps?"),
    ],
)
def test_values_out_of_bounds_are_usage_errors(refused: Callable[..., str], words: list[str], line: str) -> None:
    assert refused("a/b", *words, code=2).startswith(line)


@pytest.mark.parametrize(
    "model", ["./foo/bar", "../foo", "/no/such/folder", "~/foo", "foo", "a/b/c", "foo\\bar", "a b/c"]
)
def test_a_path_that_does_not_exist_is_not_downloaded(refused: Callable[..., str], model: str) -> None:
    assert refused(model) == f"{model} does not exist: check the path, or pass a hub id, which has the form owner/name."


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--precision", "int8"], "onnxruntime computes in fp32, not in int8."),
        (["--rows", "1"], "--rows 1 leaves no room for a guided image, which takes two rows"),
        (["--resolution", "33x32"], "33x32 does not fit this model: width and height must be multiples of 4."),
    ],
)
def test_options_that_do_not_fit_the_model(
    refused: Callable[..., str], checkpoint: Path, words: list[str], reason: str
) -> None:
    assert refused(checkpoint, *words).startswith(reason)


def found(folder: Path) -> Checkpoint:
    return find_checkpoint(str(folder))


def test_one_row_is_enough_without_guidance_or_where_it_is_embedded(checkpoint: Path, tmp_path: Path) -> None:
    one = api.ExportOptions(rows=(1,))
    check_options(found(checkpoint), replace(one, guidance=1.0))
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit(copied / "unet" / "config.json", time_cond_proj_dim=32)
    check_options(found(copied), one)
    with pytest.raises(EngineError, match="--rows 1 leaves no room"):
        check_options(found(checkpoint), one)


def test_the_default_request_can_be_scheduled(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit(copied / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    check_options(found(copied), replace(SPARE, steps=50))
    with pytest.raises(EngineError, match="100 steps of lcm by default"):
        check_options(found(copied), replace(SPARE, steps=100))
    edit(copied / "scheduler" / "scheduler_config.json", num_train_timesteps=60)
    edit(copied / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(EngineError, match="100 steps of ddim by default"):
        check_options(found(copied), replace(SPARE, steps=100))


def test_a_folder_with_a_name_too_long_for_the_api_needs_another(checkpoint: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / ("a" * 250)))
    with pytest.raises(EngineError, match="pass another --name"):
        check_options(found(copied), SPARE)
    check_options(found(copied), replace(SPARE, name="short"))


def test_engines_of_one_row_are_refused_for_a_bundle_with_guided_defaults(bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with pytest.raises(EngineError, match="--rows 1 leaves no room"):
        api.compile(copied, backends=["onnxruntime"], shapes=api.ShapeOptions(rows=(1,)))


def test_places_that_cannot_hold_a_bundle(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a file, not a folder" in refused("a/b", out=tmp_path / "file")
    assert "is a file, not a folder" in refused("a/b", out=tmp_path / "file" / "below")
    (tmp_path / "loop").symlink_to("loop")
    for link in ("link", "link/below", "loop", "loop/below"):
        assert "is a link to nothing" in refused(checkpoint, out=tmp_path / link)
    assert "lies in the model's own folder" in refused(checkpoint, out=checkpoint / "bundle")
    assert "lies in the model's own folder" in refused(checkpoint, out=checkpoint)
    check_out(tmp_path / "new" / "folder")


def test_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # noqa: ARG005 - as os.access; root may write anywhere
    with pytest.raises(EngineError, match="cannot be written: change its permissions"):
        check_out(tmp_path / "out")


def test_a_backend_that_is_not_installed_is_refused_before_the_export(
    refused: Callable[..., str], checkpoint: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(backend: str) -> str:
        raise EngineError(f"Backend {backend} needs the package x: pip install x")

    monkeypatch.setattr(checks, "installed", missing)
    assert refused(checkpoint) == "Backend onnxruntime needs the package x: pip install x"
    with pytest.raises(EngineError, match="needs the package x"):
        api.compile(bundle, backends=["onnxruntime"])


def test_int8_needs_nncf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)  # noqa: ARG005 - as importlib's
    monkeypatch.setattr(checks, "installed", lambda backend: "1")  # noqa: ARG005
    with pytest.raises(EngineError, match=r"INT8 needs the package nncf: .*int8"):
        check_compilers(["openvino"], "int8")
    check_compilers(["openvino"], "bf16")


def test_eight_bits_for_tensorrt_need_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(quantizing, "version", missing)
    monkeypatch.setattr(checks, "installed", lambda backend: "1")  # noqa: ARG005
    for precision in EIGHT_BITS:
        with pytest.raises(EngineError, match=r"need the package nvidia-modelopt: .*quantize"):
            check_compilers(["tensorrt_rtx"], precision)
    check_compilers(["tensorrt_rtx"], "bf16")


@pytest.mark.parametrize(("capability", "has_it"), [("8.6", False), ("8.9", True), ("9.0", True), ("12.0", True)])
def test_a_gpu_that_is_here_has_to_compute_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: str, has_it: bool
) -> None:
    found = Probe(Gpu(name="Here", compute_capability=capability))
    monkeypatch.setattr(checks, "probe", lambda: found)
    monkeypatch.setattr(checks, "gpu_here", lambda: found.gpu)
    monkeypatch.setattr(checks, "installed", lambda backend: "1")  # noqa: ARG005
    monkeypatch.setattr(checks, "modelopt_version", lambda: "1")
    for backend in ("tensorrt", "tensorrt_rtx"):
        with nullcontext() if has_it else pytest.raises(EngineError, match=r"--precision int8, or fp16"):
            check_compilers([backend], "fp8")
        check_compilers([backend], "int8")


def test_sizes_are_checked_before_weights_are_looked_for(checkpoint: Path, tmp_path: Path) -> None:
    """Options are checked by the configs alone: on the hub, that is before gigabytes are downloaded."""
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    for weights in copied.rglob("*.safetensors"):
        weights.unlink()
    options = api.ExportOptions(resolutions=(Size(width=33, height=32),))
    with pytest.raises(EngineError, match="multiples of 4"):
        api.build(api.CheckpointSource(str(copied)), tmp_path / "out", backends=["onnxruntime"], options=options)
