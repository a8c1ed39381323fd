"""A checkpoint's identity is a hash over every file that decides the export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from tests.support.checkpoints import edit
from tests.support.ldm import write_single_file


def test_the_identity_covers_every_file_that_decides_the_export(copied: Path, tmp_path: Path) -> None:
    def identity(*loras: Lora) -> str:
        return find_checkpoint(str(copied), loras=loras).source.sha256

    seen = [identity()]
    (copied / "README.md").write_text("unrelated")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that is not loaded")
    assert identity() == seen[0]
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    seen += [identity(Lora(tmp_path / "a.safetensors")), identity(Lora(tmp_path / "a.safetensors", 0.5))]
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    seen += [identity(Lora(tmp_path / "a.safetensors"))]
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        edit(copied / file, note="changed")
        seen += [identity()]
    with (copied / "tokenizer" / "merges.txt").open("a") as merges:
        merges.write("x y\n")
    seen += [identity()]
    with (copied / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    seen += [identity()]
    assert max(Counter(seen).values()) == 1


def test_the_identity_of_a_single_file_covers_its_configs(copied: Path, tmp_path: Path) -> None:
    path = write_single_file(copied, tmp_path / "one.safetensors")
    checkpoint = find_checkpoint(str(path), config=str(copied))
    assert checkpoint.source is checkpoint.source
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # its weights are not those that count
    assert find_checkpoint(str(path), config=str(copied)).source == checkpoint.source
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert find_checkpoint(str(path), config=str(copied)).source != checkpoint.source
