"""A checkpoint's identity is a hash over every file that decides the export."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from engines.contract import VAE_GRAPHS
from engines.files import sha256_of
from tests.support.checkpoints import Families, edit
from tests.support.ldm import write_single_file
from tests.support.tiny import make_decoder


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
    assert checkpoint.source.file_sha256 == sha256_of(path)
    assert find_checkpoint(str(copied)).source.file_sha256 is None
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # its weights are not those that count
    assert find_checkpoint(str(path), config=str(copied)).source == checkpoint.source
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert find_checkpoint(str(path), config=str(copied)).source != checkpoint.source


def test_a_vae_of_xl_exceeds_fp16_where_its_config_says_so(copied_xl: Path, families: Families, tmp_path: Path) -> None:
    """As sdxl-vae-fp16-fix does not. Configs of other families have the same key, which their pipelines ignore."""
    assert json.loads((families("sd1") / "vae" / "config.json").read_text())["force_upcast"]
    assert not find_checkpoint(str(families("sd1"))).exceeding_fp16
    assert find_checkpoint(str(copied_xl)).exceeding_fp16 == set(VAE_GRAPHS)
    decoder = make_decoder(tmp_path / "decoder")
    assert find_checkpoint(str(copied_xl), decoder=str(decoder)).exceeding_fp16 == set(VAE_GRAPHS)
    fixed = Path(shutil.copytree(copied_xl / "vae", tmp_path / "fixed"))
    edit(fixed / "config.json", force_upcast=False)
    assert not find_checkpoint(str(copied_xl), vae=str(fixed)).exceeding_fp16
    edit(copied_xl / "vae" / "config.json", force_upcast=False)
    assert not find_checkpoint(str(copied_xl)).exceeding_fp16
