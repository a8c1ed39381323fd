"""Single files are recognised by their tensors, and loaded as the folders they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.convert import as_folder
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.errors import CheckpointError
from engines.progress import NullProgress
from tests.support.checkpoints import Families, Harmful, NoteRecorder, assert_same, load
from tests.support.ldm import single_file, write_single_file


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["conditioner.embedders.0.model.ln_final.weight"], "Stable Diffusion XL refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["blocks.0.cross_attn.k.weight"], "diffusion transformer"),
        (["control_model.time_embed.0.weight"], "ControlNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["first_stage_model.encoder.conv_in.weight"], "no UNet and no text encoder"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers checkpoint"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "pass it with --lora"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "pass it with --lora"),
        (["clip_txt_mapper.weight"], "a Stable Cascade checkpoint"),
        (["model.diffusion_model.down_blocks.1.0.channelwise.0.weight"], "a Stable Cascade checkpoint"),
        (["model.diffusion_model.label_emb.0.0.weight", "cond_stage_model.model.x"], "needs a class or an image"),
        (["model.diffusion_model.time_embed.cond_proj.weight"], "latent consistency model in one file"),
        (["emb_params"], "not a checkpoint of a known layout"),
    ],
)
def test_unsupported_single_files_are_refused(tmp_path: Path, keys: list[str], complaint: str) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(tmp_path / "other.safetensors"))


def test_a_file_takes_as_many_channels_as_its_weights_say(families: Families, tmp_path: Path) -> None:
    """Whether the configs describe a model that inpaints or not."""
    tensors = single_file(families("sd1"))
    for channels, config in [(9, "sd1"), (9, "inpaint"), (4, "inpaint")]:
        weight = torch.rand(16, channels, 3, 3)
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = weight
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
        modules = load(find_checkpoint(str(tmp_path / "one.safetensors"), config=str(families(config))))
        assert modules.unet.config.in_channels == channels
        assert torch.equal(modules.unet.conv_in.weight, weight)


@pytest.mark.parametrize("channels", [5, 7, 8])
def test_a_file_with_other_channels_is_refused(families: Families, tmp_path: Path, channels: int) -> None:
    tensors = single_file(families("sd1"))
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, channels, 3, 3)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"{channels} input channels"):
        find_checkpoint(str(tmp_path / "other.safetensors"), config=str(families("sd1")))


@pytest.mark.parametrize("family", ["sd1", "sd15", "no-mid", "sd2", "xl", "ssd-1b", "bk-tiny"])
def test_a_single_file_loads_as_the_folder_it_was_made_from(families: Families, tmp_path: Path, family: str) -> None:
    folder = families(family)
    path = write_single_file(folder, tmp_path / f"{family}-one.safetensors")
    checkpoint = find_checkpoint(str(path), config=str(folder))
    assert (checkpoint.name, checkpoint.source.name) == (path.stem, path.stem)
    with as_folder(checkpoint, NullProgress()) as config:
        assert config.folder != folder
        assert config.noise_schedule == checkpoint.config.noise_schedule == CheckpointConfig(folder, "").noise_schedule
        assert {file.name for file in (config.folder / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
        assert_same(load_modules(config, checkpoint), load(find_checkpoint(str(folder))))
    assert not config.folder.exists()


def test_a_pickled_single_file_needs_allow_pickle(families: Families, plain: Modules, tmp_path: Path) -> None:
    path = write_single_file(families("sd1"), tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        find_checkpoint(str(path), config=str(families("sd1")))
    progress = NoteRecorder()
    checkpoint = find_checkpoint(str(path), config=str(families("sd1")), allow_pickle=True, progress=progress)
    assert len(progress.notes) == 1
    assert_same(load(checkpoint), plain)


def test_a_pickled_single_file_is_recognised_when_it_is_loaded(
    families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content, complaint in (
        ({"conditioner.embedders.0.model.x": torch.zeros(1)}, "Stable Diffusion XL refiner"),
        ({"state_dict": {}, "harmful": Harmful()}, "cannot be read as plain tensors"),
    ):
        torch.save(content, "one.ckpt")
        checkpoint = find_checkpoint("one.ckpt", config=str(families("sd1")), allow_pickle=True)
        with pytest.raises(CheckpointError, match=complaint):
            load(checkpoint)
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("family", "config", "complaint"),
    [
        ("sd2", "sd1", r"64 wide \(Stable Diffusion 2\), but the configs .* that takes 32"),
        ("sd15", "sd1", r"its unet has \S+ with the shape \[\d.*\], not \[\d"),
        ("sd1", "no-mid", "its UNet has 208 weights, not 162"),
        ("no-mid", "sd1", "weights of its unet are missing"),
    ],
)
def test_configs_that_describe_another_file_are_refused(
    families: Families, tmp_path: Path, family: str, config: str, complaint: str
) -> None:
    path = write_single_file(families(family), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=complaint) as raised:
        load(find_checkpoint(str(path), config=str(families(config))))
    assert "ass --config with a checkpoint of the same kind" in str(raised.value)


def test_an_sd2_file_needs_config(families: Families, tmp_path: Path) -> None:
    path = write_single_file(families("sd2"), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="does not say what its UNet predicts: pass --config"):
        find_checkpoint(str(path))
