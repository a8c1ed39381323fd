"""The comparison with other pipelines: its numbers, its table, what it says of missing systems, and one small run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from benchmarks import models
from benchmarks.peers.pipelines import __main__ as pipelines
from benchmarks.peers.pipelines.report import cells, page, psnr_of, summarize
from benchmarks.peers.pipelines.results import Measurement, PipelineResults, PipelineSettings
from benchmarks.peers.pipelines.systems import EAGER, FULL_EAGER, INSTALL, SYSTEMS
from benchmarks.process import ROOT
from loadtest.provenance import begin_run

SETTINGS = PipelineSettings(sizes={"64x64": 4}, repeats=2, rounds=2, guidance=7.5, threads=1, prompts=("a", "b"))
TITLES = [(EAGER, "eager"), (FULL_EAGER, "eager, SD 1.4"), ("openvino", "ours"), ("genai", "genai")]


def measurement(system: str, number: int = 0, **fields: object) -> Measurement:
    return Measurement.model_validate({"system": system, "size": "64x64", "round": number, "run": 0, **fields})


def results_of(*measurements: Measurement) -> PipelineResults:
    made = PipelineResults(settings=SETTINGS, runs=[begin_run(["python", "-m", "benchmarks.peers.pipelines"])])
    for one in measurements:
        made.put(one)
    return made


MEASURED = results_of(
    measurement(EAGER, seconds=(4.0, 6.0), startup=3.0, peak_bytes=4 * 2**30),
    measurement(FULL_EAGER, seconds=(10.0,), startup=3.0, peak_bytes=6 * 2**30),
    measurement("openvino", 0, seconds=(2.0, 9.0), startup=1.0, peak_bytes=2**30, errors=(0.0, 0.0)),
    measurement("openvino", 1, seconds=(2.0,), startup=2.0, peak_bytes=2 * 2**30, errors=(6.5025,)),
    measurement("genai", note="openvino-genai is not installed:\npip install openvino-genai"),
)


# --- numbers and the table


def test_psnr_is_of_eight_bits() -> None:
    assert psnr_of(255**2) == pytest.approx(0)
    assert psnr_of(6.5025) == pytest.approx(40)
    assert psnr_of(0) == math.inf


def test_figures_are_of_all_rounds() -> None:
    assert list(cells(MEASURED, "openvino", "64x64")) == ["2.00", "2.50×", "5.00×", "1.5", "2.00", "50%", "40.0"]
    assert list(cells(MEASURED, EAGER, "64x64"))[-1] == "reference"


def test_what_has_no_reference_has_no_ratio() -> None:
    alone = results_of(measurement("openvino", seconds=(2.0,), startup=1.0, peak_bytes=2**30))
    assert list(cells(alone, "openvino", "64x64")) == ["2.00", "–", "–", "1.0", "1.00", "–", "–"]


def test_identical_images_are_called_so() -> None:
    same = results_of(measurement("openvino", seconds=(2.0,), errors=(0.0,)))
    assert list(cells(same, "openvino", "64x64"))[-1] == "identical"


def test_the_page_says_which_systems_are_missing_and_why() -> None:
    lines = page(MEASURED, TITLES).splitlines()
    assert "## 64x64, 4 steps, guidance 7.5" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + len(TITLES)  # with two lines of headings
    (missing,) = [line for line in lines if line.startswith("| genai")]
    assert "not measured: openvino-genai is not installed: pip install openvino-genai |" in missing
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_measurement_replaces_an_earlier_one() -> None:
    kept = results_of(measurement("genai", note="the disk was full"))
    kept.put(measurement("genai", seconds=(1.0,)))
    assert summarize(kept, "genai", "64x64").note == ""
    assert len(kept.measurements) == 1
    assert PipelineResults.model_validate_json(kept.model_dump_json()) == kept


# --- the command


def run(*words: str) -> tuple[int, str]:
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "benchmarks.peers.pipelines", *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_small_run_compares_torch_with_ours(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images are the same; peers that are not installed are reported, and results are kept."""
    home, out = tmp_path / "models" / "small", tmp_path / "out"
    shutil.copytree(checkpoint, home / "checkpoint")
    shutil.copytree(bundle, home / "bundle")
    words = ["--out", str(out), "--models", str(tmp_path / "models"), "--size", "32x32", "--steps", "3"]
    words += ["--prompt", "a red cat", "--prompt", "two old boats", "--threads", "1"]
    only = ["--only", EAGER, "onnxruntime", "genai"]

    code, said = run(*words, *only)
    assert code == 0, said
    assert "genai: optimum-intel is not installed" in said
    found = PipelineResults.model_validate_json((out / "peers.json").read_bytes())
    eager, ours = (summarize(found, name, "32x32") for name in (EAGER, "onnxruntime"))
    for one in (eager, ours):
        (taken,) = one.measurements
        assert len(taken.seconds) == 2
        assert min(*taken.seconds, taken.startup or 0, taken.warm_up or 0) > 0
        assert taken.peak_bytes > 50 * 2**20
    assert ours.psnr is not None
    assert ours.psnr > 45
    assert psnr_of(found.seed_difference["32x32"]) < 30
    table = (out / "peers.md").read_text(encoding="utf-8")
    assert "| diffusers, PyTorch eager |" in table
    assert "| ours, ONNX Runtime |" in table
    assert "| openvino-genai (C++) | not measured: optimum-intel is not installed: pip install" in table

    assert pipelines.main([*words, *only]) == 1
    assert "--resume" in capsys.readouterr().err
    assert pipelines.main([*words, *only, "--resume", "--repeats", "3"]) == 1
    assert "measured with other options" in " ".join(capsys.readouterr().err.split())
    assert pipelines.main([*words, *only, "--resume"]) == 0
    again = PipelineResults.model_validate_json((out / "peers.json").read_bytes())
    assert [summarize(again, name, "32x32") for name in (EAGER, "onnxruntime")] == [eager, ours]
    assert len(again.runs) == 2


def test_a_system_that_fails_leaves_the_others(tmp_path: Path) -> None:
    home, out = tmp_path / "models" / "small", tmp_path / "out"
    (home / "checkpoint").mkdir(parents=True)
    (home / "checkpoint" / "model_index.json").write_text("{}")
    code, said = run("--out", str(out), "--models", str(home.parent), "--size", "32x32", "--only", EAGER, "onnxruntime")
    assert code == 0, said
    found = json.loads((out / "peers.json").read_bytes())["measurements"]
    assert [(one["system"], one["seconds"]) for one in found] == [(EAGER, []), ("onnxruntime", [])]
    assert all(one["note"] for one in found)


@pytest.mark.parametrize(
    "words", [["--only", "nobody"], ["--size", "512"], ["--repeats", "0"]], ids=["name", "size", "count"]
)
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipelines.main(["--out", "nowhere", *words])
    assert words[0] in capsys.readouterr().err


def test_a_missing_interpreter_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipelines.main(["--out", str(tmp_path), "--peers-python", "/nowhere/python"]) == 1
    assert "name an interpreter with --peers-python" in capsys.readouterr().err


def test_every_package_has_instructions_to_install_it() -> None:
    asked = {package for one in SYSTEMS for package in one.packages}
    listed = (ROOT / "benchmarks/peers/pipelines/requirements.txt").read_text(encoding="utf-8")
    assert asked == set(INSTALL)
    assert all(package in listed for package in asked)


def test_weights_named_as_published_are_read_as_before(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint / "text_encoder", tmp_path / "text_encoder")
    before = CLIPTextModel.from_pretrained(folder).state_dict()
    for _ in range(2):
        models.name_as_published(folder / "model.safetensors")
        assert all(name.startswith(("text_model.e", "text_model.f")) for name in names_in(folder))
    after = CLIPTextModel.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def names_in(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def test_systems_are_of_models_that_can_be_made() -> None:
    assert {one.model for one in SYSTEMS} <= set(models.ARCHITECTURES)
    assert len({one.name for one in SYSTEMS}) == len(SYSTEMS)
