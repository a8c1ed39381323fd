"""Real LoRAs of Stable Diffusion 1.x, packed for a model of its layout: the change of each layer is what they mean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from engines.export.lora import other_layers, updated_layers
from engines.lora.layout import lay_out, width_of
from engines.lora.names import Target
from engines.lora.pack import PackedLora, pack_lora
from engines.manifest import LoraCapacity, LoraLayer, LoraPart, Manifest
from tests import ROOT

FOLDER = ROOT.parent / "shared" / "data" / "loras"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
INNER = (*(f"attn1.{one}" for one in ATTENTION), "ff.net.0.proj", *(f"attn2.{one}" for one in ATTENTION))
BLOCKS = (
    *(f"down_blocks.{block}.attentions.{number}" for block in range(3) for number in range(2)),
    *(f"up_blocks.{block}.attentions.{number}" for block in range(1, 4) for number in range(3)),
    "mid_block.attentions.0",
)
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
# As the package `lora` numbers them: in the order in which diffusers 0.10 made the layers.
NUMBERED: dict[LoraPart, list[str]] = {
    "unet": [f"{block}.transformer_blocks.0.{layer}" for block in BLOCKS for layer in INNER],
    "text_encoder": [f"encoder.layers.{number}.self_attn.{layer}" for number in range(12) for layer in TEXT],
}


@pytest.fixture(scope="module")
def sd1(lora_manifest: Manifest) -> Manifest:
    """The manifest of a model of SD 1.5's layout, as far as LoRAs need it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    return lora_manifest.model_copy(
        update={
            "context": lora_manifest.context.model_copy(update={"width": 768}),
            "lora": LoraCapacity(slots=8, rank=64),
            "lora_layers": lay_out([*updated_layers("unet", unet), *updated_layers("text_encoder", encoder)]),
            "lora_refused": tuple(other_layers(unet)),
        }
    )


@pytest.mark.parametrize(
    ("file", "rank", "tokens"), [("analog_svd_rank4", 4, ()), ("lora_disney", 1, ("<s1>", "<s2>"))]
)
def test_real_loras_change_each_layer_as_their_paper_says(
    sd1: Manifest, file: str, rank: int, tokens: tuple[str, ...]
) -> None:
    path = Path(FOLDER, f"{file}.safetensors")
    if not path.is_file():
        pytest.skip(f"the real LoRA {path.name} is not here")
    packed = pack_lora(path, sd1)
    assert (packed.info.form, packed.info.tokens) == ("early", tokens)
    assert packed.parts == {"unet", "text_encoder"}
    assert packed.values.shape == (rank, width_of(sd1.lora_layers))
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(path).items()}
    places = {Target(layer.part, layer.name): layer for layer in sd1.lora_layers}
    for part, names in NUMBERED.items():
        for number, name in enumerate(names):
            place = places.pop(Target(part, name))
            up, down = tensors[f"{part}:{number}:up"], tensors[f"{part}:{number}:down"]
            own_up, own_down = factors_at(packed, place)
            wanted = norm(up, down)
            assert wanted > 0
            assert norm(own_up, own_down) == pytest.approx(wanted, rel=2**-10)
            assert norm(np.hstack([up, -own_up]), np.vstack([down, own_down])) <= 2**-10 * wanted, name
    assert len(sd1.lora_layers) - len(places) == 144 + 48
    assert not any(factor.any() for place in places.values() for factor in factors_at(packed, place))


def factors_at(packed: PackedLora, place: LoraLayer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[out, r] and [r, in]."""
    up = packed.values[:, place.up : place.up + place.outputs]
    down = packed.values[:, place.down : place.down + place.inputs]
    return up.T.astype(np.float64), down.astype(np.float64)


def norm(up: NDArray[np.float64], down: NDArray[np.float64]) -> float:
    """Frobenius norm of up @ down, without the product: ‖UD‖² = Σ (UᵀU) ∘ (DDᵀ)."""
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
