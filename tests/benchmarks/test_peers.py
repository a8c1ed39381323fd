"""The comparison with other pipelines: its numbers, its table, what it says of those missing, and one small run."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from benchmarks import models
from benchmarks.peers import pipelines
from benchmarks.peers.pipelines_report import EAGER, FULL_EAGER, Record, Settings, Turn, cells, measured, page, psnr
from benchmarks.peers.processes import ROOT, Watched, complaint_in, memory_of
from loadtest.provenance import begin_run

SETTINGS = Settings(sizes={"64x64": 4}, repeats=2, rounds=2, guidance=7.5, threads=1, prompts=("a", "b"))
TITLES = [(EAGER, "eager"), (FULL_EAGER, "eager, SD 1.4"), ("openvino", "ours"), ("genai", "genai")]


def turn(contestant: str, number: int = 0, **facts: object) -> Turn:
    return Turn.model_validate({"contestant": contestant, "size": "64x64", "round": number, "run": 0, **facts})


def record(*turns: Turn) -> Record:
    made = Record(settings=SETTINGS, runs=[begin_run(["python", "-m", "benchmarks.peers.pipelines"])])
    for one in turns:
        made.put(one)
    return made


MEASURED = record(
    turn(EAGER, seconds=(4.0, 6.0), startup=3.0, peak_bytes=4 * 2**30),
    turn(FULL_EAGER, seconds=(10.0,), startup=3.0, peak_bytes=6 * 2**30),
    turn("openvino", 0, seconds=(2.0, 9.0), startup=1.0, peak_bytes=2**30, errors=(0.0, 0.0)),
    turn("openvino", 1, seconds=(2.0,), startup=2.0, peak_bytes=2 * 2**30, errors=(6.5025,)),
    turn("genai", note="openvino-genai is not installed:\npip install openvino-genai"),
)


# --- numbers and the table


def test_psnr_is_of_eight_bits() -> None:
    assert psnr(255**2) == pytest.approx(0)
    assert psnr(6.5025) == pytest.approx(40)
    assert psnr(0) == math.inf


def test_figures_are_of_all_rounds() -> None:
    assert list(cells(MEASURED, "openvino", "64x64")) == ["2.00", "2.50×", "5.00×", "1.5", "2.00", "50%", "40.0"]
    assert list(cells(MEASURED, EAGER, "64x64"))[-1] == "reference"


def test_what_has_no_reference_has_no_ratio() -> None:
    alone = record(turn("openvino", seconds=(2.0,), startup=1.0, peak_bytes=2**30))
    assert list(cells(alone, "openvino", "64x64")) == ["2.00", "–", "–", "1.0", "1.00", "–", "–"]


def test_identical_pictures_are_called_so() -> None:
    same = record(turn("openvino", seconds=(2.0,), errors=(0.0,)))
    assert list(cells(same, "openvino", "64x64"))[-1] == "identical"


def test_the_page_tells_who_is_missing_and_why() -> None:
    lines = page(MEASURED, TITLES).splitlines()
    assert "## 64x64, 4 steps, guidance 7.5" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + len(TITLES)  # with two lines of headings
    (missing,) = [line for line in lines if line.startswith("| genai")]
    assert "not measured: openvino-genai is not installed: pip install openvino-genai |" in missing
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_a_turn_takes_the_place_of_the_one_before_it() -> None:
    kept = record(turn("genai", note="the disk was full"))
    kept.put(turn("genai", seconds=(1.0,)))
    assert measured(kept, "genai", "64x64").note == ""
    assert len(kept.turns) == 1
    assert Record.model_validate_json(kept.model_dump_json()) == kept


# --- processes


def test_memory_is_that_of_a_process_and_its_children(tmp_path: Path) -> None:
    hold = "held = bytearray(50 * 2**20); held[::4096] = bytes([1]) * len(held[::4096]); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    alone = Watched([sys.executable, "-c", f"print(); {hold}"], tmp_path / "alone.log", spoken_to=True)
    both = Watched([sys.executable, "-c", f"print(flush=True); {parent}"], tmp_path / "both.log", spoken_to=True)
    try:
        deadline = time.monotonic() + 60
        while not memory_of(both.process.pid) > memory_of(alone.process.pid) > 50 * 2**20:
            assert time.monotonic() < deadline
            assert alone.process.poll() is None
            assert both.process.poll() is None
    finally:
        peaks = [alone.end(), both.end()]
    assert peaks[1] > peaks[0] > 50 * 2**20
    assert memory_of(alone.process.pid) == 0


def test_a_log_s_last_complaints_are_told() -> None:
    said = "error: old\nloading\r99%\x1b[Ka tensor has a wrong shape\nit failed\nthat failed\nerror: no model\nbye"
    told = "a tensor has a wrong shape; it failed; that failed; error: no model"
    assert complaint_in(said) == told
    assert complaint_in(f"{said}\nTraceback (most recent call last)\n  ValueError: 1") == told
    assert complaint_in("loading\n\n") == "loading"
    assert complaint_in("") == "it said nothing"


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
    return done.returncode, done.stdout


def test_a_small_run_compares_torch_with_ours(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """The pictures are the same; the peers that are not installed are told, and what was measured is kept."""
    home, out = tmp_path / "models" / "small", tmp_path / "out"
    shutil.copytree(checkpoint, home / "checkpoint")
    shutil.copytree(bundle, home / "bundle")
    words = ["--out", str(out), "--models", str(tmp_path / "models"), "--size", "32x32", "--steps", "3"]
    words += ["--prompt", "a red cat", "--prompt", "two old boats", "--threads", "1"]
    only = ["--only", EAGER, "onnxruntime", "genai"]

    code, said = run(*words, *only)
    assert code == 0, said
    assert "genai: optimum-intel is not installed" in said
    found = Record.model_validate_json((out / "pipelines.json").read_bytes())
    eager, ours = (measured(found, name, "32x32") for name in (EAGER, "onnxruntime"))
    for one in (eager, ours):
        (taken,) = one.turns
        assert len(taken.seconds) == 2
        assert min(*taken.seconds, taken.startup or 0, taken.warm_up or 0) > 0
        assert taken.peak_bytes > 50 * 2**20
    assert ours.psnr is not None
    assert ours.psnr > 45
    assert psnr(found.apart["32x32"]) < 30
    table = (out / "pipelines.md").read_text(encoding="utf-8")
    assert "| diffusers, PyTorch eager |" in table
    assert "| ours, ONNX Runtime |" in table
    assert "| openvino-genai (C++) | not measured: optimum-intel is not installed: pip install" in table

    code, said = run(*words, *only)
    assert (code, "--resume" in said) == (1, True), said
    code, said = run(*words, *only, "--resume", "--repeats", "3")
    assert (code, "measured otherwise" in said) == (1, True), said
    code, said = run(*words, *only, "--resume")
    again = Record.model_validate_json((out / "pipelines.json").read_bytes())
    assert code == 0, said
    assert [measured(again, name, "32x32") for name in (EAGER, "onnxruntime")] == [eager, ours]
    assert len(again.runs) == 2


def test_a_contestant_that_fails_leaves_the_others(tmp_path: Path) -> None:
    home, out = tmp_path / "models" / "small", tmp_path / "out"
    (home / "checkpoint").mkdir(parents=True)
    (home / "checkpoint" / "model_index.json").write_text("{}")
    code, said = run("--out", str(out), "--models", str(home.parent), "--size", "32x32", "--only", EAGER, "onnxruntime")
    assert code == 0, said
    found = json.loads((out / "pipelines.json").read_bytes())["turns"]
    assert [(one["contestant"], one["seconds"]) for one in found] == [(EAGER, []), ("onnxruntime", [])]
    assert all(one["note"] for one in found)


@pytest.mark.parametrize(
    "words", [["--only", "nobody"], ["--size", "512"], ["--repeats", "0"]], ids=["name", "size", "count"]
)
def test_options_that_say_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipelines.main(["--out", "nowhere", *words])
    assert words[1] in capsys.readouterr().err


def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipelines.main(["--out", str(tmp_path), "--peers-python", "/nowhere/python"]) == 1
    assert "name an interpreter with --peers-python" in capsys.readouterr().out


def test_every_package_can_be_installed_by_what_is_said() -> None:
    asked = {package for one in pipelines.CONTESTANTS for package in one.packages}
    listed = (ROOT / "loadtest" / "pipelines.txt").read_text(encoding="utf-8")
    assert asked == set(pipelines.INSTALL)
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


def test_contestants_are_of_models_that_can_be_made() -> None:
    assert {one.model for one in pipelines.CONTESTANTS} <= set(models.ARCHITECTURES)
    assert len({one.name for one in pipelines.CONTESTANTS}) == len(pipelines.CONTESTANTS)
