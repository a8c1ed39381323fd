"""Where the factors of LoRAs lie in the pool: apart, each at a multiple of its width, with little between them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from engines.export.lora import updated_layers
from engines.lora.layout import UpdatedLayer, lay_out, width_of
from engines.manifest import LoraLayer
from engines.manifest_fields import check_factors

WIDTHS = st.sampled_from([16, 32, 48, 64, 96, 320])
LAYERS = st.lists(st.tuples(WIDTHS, WIDTHS), min_size=1, max_size=30)
SD_1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def laid_out(widths: list[tuple[int, int]]) -> tuple[LoraLayer, ...]:
    return lay_out(UpdatedLayer("unet", f"layer.{index}", *pair) for index, pair in enumerate(widths))


def spans(layers: tuple[LoraLayer, ...]) -> list[tuple[int, int]]:
    downs = [(layer.down, layer.down + layer.inputs) for layer in layers]
    return sorted([*downs, *((layer.up, layer.up + layer.outputs) for layer in layers)])


@given(LAYERS)
def test_factors_lie_apart_at_multiples_of_their_widths(widths: list[tuple[int, int]]) -> None:
    layers = laid_out(widths)
    total = width_of(layers)
    assert all(before[1] <= after[0] for before, after in pairwise(spans(layers)))
    assert all(start % (end - start) == 0 and total % (end - start) == 0 for start, end in spans(layers))
    assert spans(layers)[-1][1] <= total
    check_factors(layers, width=total)


@given(LAYERS, st.data())
def test_factors_over_others_or_beyond_the_end_are_refused(widths: list[tuple[int, int]], data: st.DataObject) -> None:
    layers = list(laid_out(widths))
    total = width_of(layers)
    number = data.draw(st.integers(0, len(layers) - 1))
    place = data.draw(st.sampled_from([0, layers[number].down + 1, total, 2 * total]))
    layers[number] = layers[number].model_copy(update={"up": place})
    crowded = any(
        before[1] > after[0] or after[0] % (after[1] - after[0]) for before, after in pairwise(spans(tuple(layers)))
    )
    if place == 0 and not crowded:
        return  # where it lay already, or where nothing else does
    with pytest.raises(ValueError, match="LoRA pool"):
        check_factors(layers, width=total)


@pytest.mark.parametrize(
    ("unet", "text_encoder", "layers", "values"),
    [
        pytest.param({**SD_1, "layers_per_block": 2}, CLIP_L, (230, 72), 706_560, id="SD 1.5"),
        pytest.param({**SD_2, "layers_per_block": 2}, CLIP_H, (230, 138), 983_040, id="SD 2.1"),
        pytest.param({**SD_1, "layers_per_block": 1, "mid_block_type": None}, CLIP_L, (132, 72), 460_800, id="small"),
    ],
)
def test_real_models_have_little_padding(
    unet: dict[str, object], text_encoder: dict[str, int], layers: tuple[int, int], values: int
) -> None:
    with torch.device("meta"):
        module: torch.nn.Module = UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), **unet)
        encoder: torch.nn.Module = CLIPTextModel(CLIPTextConfig(**text_encoder))
    found = (list(updated_layers("unet", module)), list(updated_layers("text_encoder", encoder)))
    assert tuple(map(len, found)) == layers
    placed = lay_out([*found[0], *found[1]])
    assert width_of(placed) == values
    assert values < 1.05 * sum(layer.inputs + layer.outputs for layer in placed)
