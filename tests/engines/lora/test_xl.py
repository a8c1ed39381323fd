"""LoRAs of Stable Diffusion XL: every layer of the UNet and of both text encoders, in the names of every tool."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.errors import CheckpointError
from engines.lora.names import Target
from engines.lora.pack import inspect_lora, pack_lora
from engines.manifest import LoraPart, Manifest
from tests.engines.lora.test_applied import GRAPHS, WEIGHT, apply, decibels, traced
from tests.engines.lora.test_pack import packed_change
from tests.support.checkpoints import load
from tests.support.loras import XL_FORMS, FileForm, make_changes, shapes_in, shapes_of, write_lora

pytest.importorskip("peft", reason="PEFT is not installed")
# diffusers leaves these out where kohya's files name them as diffusers does: it warns of unexpected keys.
LEFT_OUT = {Target("unet", "add_embedding.linear_1"), Target("unet", "add_embedding.linear_2")}
QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SGM_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def manifest(xl_bundle: Path) -> Manifest:
    return Manifest.load(xl_bundle)


@pytest.fixture(scope="module")
def plain(xl_checkpoint: Path) -> Modules:
    return load(find_checkpoint(str(xl_checkpoint)))


def fused_by_diffusers(checkpoint: Path, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionXLPipeline.from_pretrained(checkpoint)
        pipeline.load_lora_weights(str(path))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def weight_of(model: Any, target: Target) -> torch.Tensor:
    weight: torch.Tensor = getattr(model, target.part).get_submodule(target.name).weight
    return weight.detach()


@pytest.mark.parametrize("form", XL_FORMS)
def test_the_change_is_what_diffusers_fuses(
    xl_checkpoint: Path, plain: Modules, manifest: Manifest, tmp_path: Path, form: FileForm
) -> None:
    """Fused when a bundle is built, convolutions included, and in the pool of requests without them."""
    shapes = shapes_of(plain)
    if form == "diffusers-old":  # which names only attention in the UNet
        shapes = {target: shape for target, shape in shapes.items() if target.part != "unet" or ".attn" in target.name}
    pooled = {target: shape for target, shape in shapes.items() if target in shapes_in(manifest)}
    assert {target.part for target in pooled} == {"unet", "text_encoder", "text_encoder_2"}
    changes = make_changes(shapes, seed=6)
    path = write_lora(tmp_path / "style.safetensors", changes, form, alpha=3)
    ours = load(find_checkpoint(str(xl_checkpoint), loras=[Lora(path)]))
    theirs = fused_by_diffusers(xl_checkpoint, path)
    linear = {target: changes[target] for target in pooled}
    path = write_lora(tmp_path / "linear.safetensors", linear, form, alpha=3, beside=manifest.lora_refused)
    packed = pack_lora(path, manifest)
    assert packed.parts == {"unet", "text_encoder", "text_encoder_2"}
    for target in shapes.keys() - (LEFT_OUT if form == "kohya" else set()):
        change = (weight_of(theirs, target) - weight_of(plain, target)).flatten(1).numpy()
        assert np.abs(change).max() > 1e-3
        torch.testing.assert_close(weight_of(ours, target), weight_of(theirs, target))
        if target in pooled:
            found = packed_change(packed, manifest, target)
            assert np.abs(found - change).max() <= 2**-9 * np.abs(change).max(), target


def test_the_graphs_do_what_the_fused_model_does(
    xl_checkpoint: Path, xl_bundle: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """With updates of every layer, those of the pooled embedding's projection and of `add_embedding` included."""
    changes = make_changes(shapes_in(manifest), seed=4, rank=3, strength=0.2)
    path = write_lora(tmp_path / "style.safetensors", changes, "kohya-sgm", alpha=2, beside=manifest.lora_refused)
    packed = pack_lora(path, manifest)
    without, fused = traced(xl_checkpoint, manifest), traced(xl_checkpoint, manifest, Lora(path, WEIGHT))
    for graph in GRAPHS:
        wanted = fused[graph].compute(fused[graph].random_inputs())
        plain = without[graph].compute(without[graph].random_inputs())
        found = apply(xl_bundle, graph, fused[graph], packed)
        for output in wanted.keys() - {"is_finite"}:
            assert decibels(found[output], wanted[output], plain[output]) >= 60, (graph, output)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_files_of_peft_alone_are_of_the_encoder_that_they_fit(
    manifest: Manifest, tmp_path: Path, part: LoraPart
) -> None:
    """PEFT does not write which part of a pipeline it has trained."""
    shapes = {target: shape for target, shape in shapes_in(manifest).items() if target.part == part}
    path = write_lora(tmp_path / "adapter_model.safetensors", make_changes(shapes, seed=1), "peft", alpha=8)
    assert pack_lora(path, manifest).parts == {part}


def test_convolutions_are_refused_by_the_pool(manifest: Manifest, tmp_path: Path) -> None:
    """As LCM-LoRA has them: it is fused when a bundle is built."""
    layer = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {f"{layer}.lora_down.weight": torch.ones(4, 16, 3, 3), f"{layer}.lora_up.weight": torch.ones(16, 4, 1, 1)}
    save_file(tensors, tmp_path / "lcm.safetensors")
    refusal = inspect_lora(tmp_path / "lcm.safetensors", manifest).refusal
    assert "updates the convolution down_blocks.0.resnets.0.conv1, as LoCon does" in refusal
    assert "fuse it into the model" in refusal


@pytest.mark.parametrize(
    ("layer", "width", "complaint"),
    [
        (
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            48,
            "for Stable Diffusion XL, with updates of a second text enc",
        ),
        (
            "text_encoder_2.text_projection",
            48,
            "is a LoRA for Stable Diffusion XL, with updates of a second text encoder",
        ),
        (
            SGM_QUERY.replace("attn1_to_q", "attn2_to_k"),
            2048,
            "for Stable Diffusion XL, with prompt embeddings 2048 wide",
        ),
        (SGM_QUERY.replace("4_1", "11_1"), 16, "updates the layer lora_unet_input_blocks_11_1.*made for another model"),
    ],
)
def test_loras_of_xl_are_refused_by_other_models(
    checkpoint: Path, lora_bundle: Path, tmp_path: Path, layer: str, width: int, complaint: str
) -> None:
    path = tmp_path / "style.safetensors"
    down, up = ("lora_A", "lora_B") if "." in layer else ("lora_down", "lora_up")
    save_file({f"{layer}.{down}.weight": torch.ones(4, width), f"{layer}.{up}.weight": torch.ones(width, 4)}, path)
    with pytest.raises(CheckpointError, match=complaint):
        pack_lora(path, Manifest.load(lora_bundle))
    with pytest.raises(CheckpointError, match=complaint):
        load(find_checkpoint(str(checkpoint), loras=[Lora(path)]))


def test_loras_of_sd1_are_refused_by_xl(
    lora_bundle: Path, xl_checkpoint: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """By the width of the prompt embeddings, or by the shape of a layer that both have."""
    shapes = shapes_in(Manifest.load(lora_bundle))
    changes = make_changes(shapes, seed=1)
    whole = write_lora(tmp_path / "whole.safetensors", changes)
    attention = {target: one for target, one in changes.items() if ".attn1.to_q" in target.name}
    narrow = write_lora(tmp_path / "narrow.safetensors", attention)
    for path, complaint in (
        (whole, "prompt embeddings 32 wide, and those of .* are 80 wide"),
        (narrow, "another model"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            pack_lora(path, manifest)
        with pytest.raises(CheckpointError, match=complaint):
            load(find_checkpoint(str(xl_checkpoint), loras=[Lora(path)]))
