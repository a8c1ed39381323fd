"""`--variant` chooses among the weights of a folder, as in diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.errors import CheckpointError
from tests.support.checkpoints import PARTS, assert_same, load, pickle_weights
from tests.support.ldm import write_single_file


def rename(folder: Path, part: str, variant: str) -> None:
    (path,) = [*(folder / part).glob("*model.safetensors"), *(folder / part).glob("*model.bin")]
    path.rename(path.with_name(f"{path.stem}.{variant}{path.suffix}"))


def test_a_folder_with_one_variant_is_read_with_it(copied: Path, plain: Modules) -> None:
    for part in PARTS:
        rename(copied, part, "fp16")
    with pytest.raises(
        CheckpointError, match=r"no model\.safetensors, and weights of the variants fp16: .*--variant fp16"
    ):
        find_checkpoint(str(copied))
    with pytest.raises(CheckpointError, match=r"no weights of the variant ema \(it has fp16\)"):
        find_checkpoint(str(copied), variant="ema")
    assert_same(load(find_checkpoint(str(copied), variant="fp16")), plain)


def test_parts_without_the_variant_have_their_plain_weights(copied: Path, plain: Modules) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    other = {name: weight + 1 for name, weight in load_file(weights).items()}
    save_file(other, weights.with_suffix(".non_ema.safetensors"), metadata={"format": "pt"})
    assert_same(load(find_checkpoint(str(copied))), plain)
    checkpoint = find_checkpoint(str(copied), variant="non_ema")
    modules = load(checkpoint)
    assert torch.equal(modules.unet.state_dict()["conv_in.bias"], other["conv_in.bias"])
    assert torch.equal(modules.vae.state_dict()["quant_conv.bias"], plain.vae.state_dict()["quant_conv.bias"])
    assert checkpoint.source.sha256 != find_checkpoint(str(copied)).source.sha256


def test_a_pickled_variant_needs_allow_pickle(copied: Path, plain: Modules) -> None:
    pickle_weights(copied)
    for part in PARTS:
        rename(copied, part, "fp16")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        find_checkpoint(str(copied), variant="fp16")
    assert_same(load(find_checkpoint(str(copied), variant="fp16", allow_pickle=True)), plain)


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("{stem}.fp16-0000{n}-of-00002.safetensors", "{stem}.safetensors.index.fp16.json"),
        ("{stem}-0000{n}-of-00002.fp16.safetensors", "{stem}.safetensors.index.fp16.json"),
    ],
)
def test_shards_of_a_variant_are_its_weights(copied: Path, shard: str, index: str) -> None:
    rename(copied, "vae", "fp16")
    stem = "diffusion_pytorch_model"
    (copied / "unet" / f"{stem}.safetensors").unlink()
    names = sorted([*(shard.format(stem=stem, n=number) for number in (1, 2)), index.format(stem=stem)])
    for name in names:
        (copied / "unet" / name).write_bytes(b"{}")
    config = find_checkpoint(str(copied), variant="fp16").config
    assert sorted(path.name for path in config.weights("unet")) == names
    assert [config.part_weights(part).variant for part in PARTS] == [None, "fp16", "fp16"]
    assert config.variants == ("fp16",)


def test_a_single_file_has_no_variants(copied: Path, tmp_path: Path) -> None:
    path = write_single_file(copied, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="is one file: leave it out"):
        find_checkpoint(str(path), config=str(copied), variant="fp16")
