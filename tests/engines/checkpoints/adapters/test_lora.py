"""LoRAs are fused as their paper says; what cannot be fused is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.errors import CheckpointError
from tests.support.checkpoints import PARTS, Families, load
from tests.support.loras import Changes, FileForm, make_changes, shapes_of, write_lora


def changes(modules: Modules, *, seed: int) -> Changes:
    """Of layers of each kind in both parts."""
    wanted = (
        "attn1.to_q",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "proj_in",
        "resnets.0.conv1",
        "self_attn.v_proj",
        "mlp.fc1",
    )
    shapes = {target: shape for target, shape in shapes_of(modules).items() if target.name.endswith(wanted)}
    return make_changes(shapes, seed=seed)


def expected(modules: Modules, *added: tuple[float, Changes]) -> dict[str, Tensor]:
    weights = {
        f"{part}.{name}": weight.clone()
        for part in PARTS
        for name, weight in getattr(modules, part).state_dict().items()
    }
    for scale, made in added:
        for (part, name), factors in made.items():
            weights[f"{part}.{name}.weight"] += scale * factors.product()
    return weights


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_loras_are_added_to_the_weights_and_keep_the_modules(
    families: Families, plain: Modules, tmp_path: Path, form: FileForm
) -> None:
    first, second = changes(plain, seed=1), changes(plain, seed=2)
    loras = (
        Lora(write_lora(tmp_path / "a.safetensors", first, form, alpha=2.0), 0.75),
        Lora(write_lora(tmp_path / "b.safetensors", second, form, alpha=4.0), -0.5),
    )
    checkpoint = find_checkpoint(str(families("sd1")), loras=loras)
    assert checkpoint.source.loras == ("a.safetensors:0.75", "b.safetensors:-0.5")
    untouched = find_checkpoint(str(families("sd1"))).source
    fused = load(checkpoint)
    wanted = expected(plain, (0.75 * 2 / 4, first), (-0.5, second))
    for part in PARTS:
        assert [type(module) for module in getattr(fused, part).modules()] == [
            type(module) for module in getattr(plain, part).modules()
        ]
        for name, weight in getattr(fused, part).state_dict().items():
            assert torch.allclose(weight, wanted[f"{part}.{name}"], atol=1e-6), name
    assert len(first) > 10
    assert (
        find_checkpoint(str(families("sd1"))).source == untouched
    )  # weights are mapped into memory, and changed in it alone


def test_alpha_defaults_to_the_rank(families: Families, plain: Modules, tmp_path: Path) -> None:
    weight = plain.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    up, down = torch.ones(len(weight), 2), torch.ones(2, weight.shape[1])
    save_file({f"{layer}.up.weight": up, f"{layer}.down.weight": down}, tmp_path / "old.safetensors")
    fused = load(find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "old.safetensors", 0.5)]))
    there = fused.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.allclose(there, weight + 1.0, atol=1e-6)


QUERY = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({"conv_in.weight": (16, 4, 3, 3)}, "is not a LoRA"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, "Stable Diffusion XL"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)}, "diffusion transformer"),
        ({f"lora_unet_{QUERY}.hada_w1_a": (4, 8)}, "a LoHa"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.dora_scale": (1,)}, "a DoRA"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 320), f"lora_unet_{QUERY}.lora_up.weight": (320, 4)}, "shape"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16)}, f"lacks the factor up of the layer lora_unet_{QUERY}"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.lora_up.weight": (16, 2)}, "own factors"),
        (
            {f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.lora_x.weight": (1,)},
            "not a known factor of a LoRA",
        ),
        (
            {f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.diff_b": (1,)},
            "a full difference of weights",
        ),
        (
            {f"lora_unet_{QUERY.replace('attn1_to_q', 'attn2_to_k')}.lora_down.weight": (4, 2048)},
            "a LoRA for Stable Diffusion XL, with prompt embeddings 2048 wide, and those of sd1 are 32 wide",
        ),
        (
            {f"unet.{'down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v'}.lora_A.weight": (4, 1024)},
            r"a LoRA for Stable Diffusion 2\.x, with prompt embeddings 1024 wide",
        ),
        (
            {"lora_unet_down_blocks_7_attn1_to_q.lora_down.weight": (4, 8)},
            r"updates the layer lora_unet_down_blocks_7_\S+, which this model does not have: it was made for another",
        ),
    ],
)
def test_loras_that_do_not_fit_are_refused(
    families: Families, tmp_path: Path, shapes: dict[str, tuple[int, ...]], complaint: str
) -> None:
    path = tmp_path / "style.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(CheckpointError, match=complaint):
        load(find_checkpoint(str(families("sd1")), loras=[Lora(path)]))


def test_unsupported_training_options_are_refused(families: Families, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="use_dora"):
        load(find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "a.safetensors")]))


def test_loras_are_parsed_with_their_scale() -> None:
    assert Lora.parse("style.safetensors") == Lora(Path("style.safetensors"), 1.0)
    assert Lora.parse("a/style.safetensors:0.8") == Lora(Path("a/style.safetensors"), 0.8)
    assert Lora.parse(r"C:\style.safetensors") == Lora(Path(r"C:\style.safetensors"))
    assert Lora.parse(r"C:\style.safetensors:-1").scale == -1
    assert str(Lora(Path("a/style.safetensors"))) == "style.safetensors:1"


@pytest.mark.parametrize(
    "text",
    [
        "style.pt",
        "a/style.bin:0.5",
        "owner/style",
        "style.safetensors:",
        "style.safetensors:big",
        "x.safetensors:nan",
        "",
    ],
)
def test_malformed_loras_are_explained(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"write"):
        Lora.parse(text)


def test_a_missing_lora_is_refused(families: Families, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "style.safetensors")])
