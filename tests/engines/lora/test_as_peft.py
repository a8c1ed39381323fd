"""Packed LoRAs are what diffusers and PEFT make of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel

from engines.lora.names import Target
from engines.lora.pack import pack_lora
from engines.manifest import Manifest
from tests.engines.lora.test_pack import packed_change
from tests.support.loras import FileForm, make_changes, shapes_in, write_lora
from tests.support.references import load_pipeline

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.mark.parametrize("form", ["kohya", "diffusers", "diffusers-old"])
def test_the_change_is_what_diffusers_fuses(
    checkpoint: Path, lora_manifest: Manifest, tmp_path: Path, form: FileForm
) -> None:
    shapes = {target: shape for target, shape in shapes_in(lora_manifest).items() if ".attn" in target.name}
    path = write_lora(tmp_path / "style.safetensors", make_changes(shapes, seed=6), form, alpha=3)
    pipeline = load_pipeline(checkpoint)
    before = {target: weight_of(pipeline, target) for target in shapes}
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    packed = pack_lora(path, lora_manifest)
    for target in shapes:
        fused = weight_of(pipeline, target) - before[target]
        assert np.abs(fused).max() > 1e-3
        assert np.abs(packed_change(packed, lora_manifest, target) - fused).max() <= 2**-9 * np.abs(fused).max(), target


def weight_of(pipeline: Any, target: Target) -> np.ndarray[Any, Any]:
    weight = getattr(pipeline, target.part).get_submodule(target.name).weight.detach()
    return np.array(weight.flatten(1).numpy())


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_change_is_that_of_a_file_that_peft_has_saved(
    checkpoint: Path, lora_manifest: Manifest, tmp_path: Path, stabilized: bool
) -> None:
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "proj_in", "ff.net.0.proj"],
        rank_pattern={"proj_in": 2, r"mid_block.*to_q": 8},
        alpha_pattern={"attn2.to_v": 1, r"down_blocks\.\d+\..*proj_in": 9},
        use_rslora=stabilized,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(unet, config)
    model.save_pretrained(tmp_path)
    packed = pack_lora(tmp_path / "adapter_model.safetensors", lora_manifest)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert packed.info.rank == 8
    assert len(layers) == 4 * 6
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default").detach().flatten(1).numpy()
        found = packed_change(packed, lora_manifest, Target("unet", name))
        assert np.abs(found - wanted).max() <= 2**-9 * np.abs(wanted).max(), name
