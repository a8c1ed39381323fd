"""Real LoRAs of Stable Diffusion 1.x: what the pool holds of them changes weights as their files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.models import make_unet
from engines.export.lora import other_layers, updated_layers
from engines.lora.layout import lay_out
from engines.lora.pack import pack_lora
from engines.manifest import LoraCapacity, LoraPart, Manifest
from tests import ROOT

LORAS = ROOT.parent / "shared" / "data" / "loras"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCKS, _LAYERS = ("down_blocks", "up_blocks", "mid_block"), ("attn1", "ff", "attn2")


@pytest.fixture(scope="module")
def sd15() -> dict[LoraPart, nn.Module]:
    """The architecture of SD 1.5; weights have shapes and no memory."""
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
        return {"unet": make_unet(2), "text_encoder": encoder}


@pytest.fixture(scope="module")
def manifest(sd15: dict[LoraPart, nn.Module], lora_bundle: Path) -> Manifest:
    """Of a bundle of it: what packing reads of one."""
    tiny = Manifest.read(lora_bundle)
    fields = {
        "lora": LoraCapacity(slots=8, rank=64),
        "lora_layers": lay_out(layer for part, module in sd15.items() for layer in updated_layers(part, module)),
        "lora_refused": tuple(other_layers(sd15["unet"])),
        "context": tiny.context.model_copy(update={"width": 768}),
    }
    return tiny.model_copy(update=fields)


def numbered(part: LoraPart, module: nn.Module) -> list[str]:
    """The layers in the order of the early package's numbers: those within its classes, as diffusers 0.10 had them."""
    if part == "text_encoder":
        owners = [name for name, _ in module.named_modules() if name.endswith("self_attn")]
        return [f"{owner}.{layer}" for owner in owners for layer in ("k_proj", "v_proj", "q_proj", "out_proj")]
    owners = [name for name, one in module.named_modules() if type(one).__name__ in ("Attention", "GEGLU")]
    layers = {owner: ("proj",) if owner.endswith(".0") else _ATTENTION for owner in sorted(owners, key=place)}
    return [f"{owner}.{layer}" for owner, inner in layers.items() for layer in inner]


def place(owner: str) -> tuple[int, list[int], int]:
    outer, _, inner = owner.partition(".transformer_blocks.")
    block, *numbers = outer.split(".")
    return _BLOCKS.index(block), [int(one) for one in numbers if one.isdecimal()], _LAYERS.index(inner.split(".")[1])


@pytest.mark.parametrize("file", ["analog_svd_rank4", "lora_disney"])
def test_the_pool_changes_weights_as_the_file_says(
    sd15: dict[LoraPart, nn.Module], manifest: Manifest, file: str
) -> None:
    """By less than FP16's rounding, in each of 192 layers, and no other."""
    path = LORAS / f"{file}.safetensors"
    if not path.is_file():
        pytest.skip(f"the real LoRA {path.name} is not here")
    tensors, packed = load_file(path), pack_lora(path, manifest)
    values = torch.from_numpy(packed.values.astype(np.float64))
    places = {(layer.part, layer.name): layer for layer in manifest.lora_layers}
    for part, module in sd15.items():
        for number, name in enumerate(numbered(part, module)):
            layer = places.pop((part, name))
            up, down = (values[:, at : at + n] for at, n in ((layer.up, layer.outputs), (layer.down, layer.inputs)))
            theirs = tensors[f"{part}:{number}:up"].double() @ tensors[f"{part}:{number}:down"].double()
            assert (up.T @ down - theirs).norm() < 1e-3 * theirs.norm(), name
    assert len(manifest.lora_layers) - len(places) == 144 + 48
    assert not any(values[:, layer.up : layer.up + layer.outputs].any() for layer in places.values())
