"""What published files are named and what headers say tells which distillation they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.distilled import find_distillation
from tests.support.checkpoints import edit
from tests.support.tiny import edit_index

FACTORS = {"unet.x.lora_A.weight": torch.zeros(4, 16), "unet.x.lora_B.weight": torch.zeros(16, 4)}


def of_lora(checkpoint: Path, file: Path, metadata: dict[str, str] | None = None) -> str | None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(FACTORS, file, metadata)
    found = find_distillation(Checkpoint("tiny-sd", checkpoint, loras=(Lora(file),)))
    return found.preset if found else None


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("sdxl_lightning_4step_lora", "lightning-4"),
        ("Hyper-SDXL-2steps-lora", "hyper-2"),
        ("Hyper-SD15-1step-lora", "hyper-1"),
        ("Hyper-SD15-8steps-CFG-lora", "hyper-8-cfg"),
        ("Hyper-SDXL-12steps-CFG-lora", "hyper-12-cfg"),
        ("lcm-lora-sdv1-5", "lcm-lora"),
        ("lcm_lora_sdxl", "lcm-lora"),
        ("dmd2_sdxl_4step_lora_fp16", "dmd2"),
        ("lcm-lora-sdv1-5/pytorch_lora_weights", "lcm-lora"),
        ("TCD-SD15-LoRA/pytorch_lora_weights", "tcd"),
        ("style", None),
        ("hyper-realism-lora", None),
        ("lightning-bolts", None),
        ("lcm-lora-sdxl/style", None),
    ],
)
def test_a_lora_is_known_by_its_published_name(checkpoint: Path, tmp_path: Path, name: str, preset: str | None) -> None:
    assert of_lora(checkpoint, tmp_path / f"{name}.safetensors") == preset


def test_what_a_lora_says_itself_comes_before_its_name(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "Hyper-SD15-4steps-lora.safetensors"
    assert of_lora(checkpoint, file, {"modelspec.title": "Hyper-SD15-8steps-lora"}) == "hyper-8"
    assert of_lora(checkpoint, tmp_path / "renamed.safetensors", {"ss_output_name": "lcm-lora-sdv1-5"}) == "lcm-lora"


def published_as(checkpoint: Path, folder: Path, spacing: str) -> Checkpoint:
    copied = Path(shutil.copytree(checkpoint, folder))
    edit(copied / "scheduler" / "scheduler_config.json", timestep_spacing=spacing)
    return Checkpoint(folder.name, copied)


@pytest.mark.parametrize(("name", "is_turbo"), [("sd-turbo", True), ("SDXL_Turbo", True), ("turbo-style", False)])
def test_turbo_is_known_by_its_name_and_its_scheduler(
    checkpoint: Path, tmp_path: Path, name: str, is_turbo: bool
) -> None:
    found = find_distillation(published_as(checkpoint, tmp_path / name, "trailing"))
    assert (found.preset if found else None) == ("turbo" if is_turbo else None)
    assert find_distillation(published_as(checkpoint, tmp_path / "other" / name, "leading")) is None


def test_an_index_tells_what_a_checkpoint_was_made_of(checkpoint: Path, tmp_path: Path) -> None:
    made = published_as(checkpoint, tmp_path / "mine", "trailing")
    edit_index(made.path, _name_or_path="stabilityai/sd-turbo")
    found = find_distillation(Checkpoint("mine", made.path))
    assert found is not None
    assert (found.preset, found.evidence) == ("turbo", "the name sd-turbo")


@pytest.mark.parametrize("named", ["file", "title"])
def test_a_single_file_tells_by_its_title_and_its_name(checkpoint: Path, tmp_path: Path, named: str) -> None:
    file = tmp_path / ("sd_turbo.safetensors" if named == "file" else "model.safetensors")
    save_file(FACTORS, file, {"modelspec.title": "SDXL Turbo"} if named == "title" else None)
    found = find_distillation(Checkpoint(file.stem, file, config_folder=checkpoint))
    assert found is not None
    assert found.preset == "turbo"


def test_a_checkpoint_that_says_nothing_is_none(checkpoint: Path) -> None:
    assert find_distillation(Checkpoint("tiny-sd", checkpoint)) is None
