"""LoRAs in the forms that training tools have written them in, at the strength that they were trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.adapters.lora import Lora, check_lora
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.add_tokens import add_to_text_encoders, add_to_tokenizer
from engines.checkpoints.loading.modules import Modules
from engines.demo.tokenizer import write_tokenizer
from engines.errors import CheckpointError
from engines.export.lora import updated_layers
from engines.lora.file import read_lora_header
from engines.lora.names import Target
from engines.lora.updates import Shape, outline
from tests import ROOT
from tests.support.checkpoints import Families, NoteRecorder, load
from tests.support.loras import Changes, early_layers, make_changes, shapes_of, write_lora
from tests.support.tiny import WIDTH

DATA = ROOT.parent / "shared" / "data"
RANK = 4
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "encoder.layers.1.self_attn.q_proj"
TEXT_OUT = "encoder.layers.1.self_attn.out_proj"
WIDTHS = {QUERY: 16, OUT: 16, TEXT: WIDTH, TEXT_OUT: WIDTH}


def factors(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, RANK, generator=generator), torch.randn(RANK, width, generator=generator)


def fuse(families: Families, path: Path, *, scale: float = 1.0) -> Modules:
    return load(find_checkpoint(str(families("sd1")), loras=[Lora(path, scale)]))


def weight_of(modules: Modules, layer: str) -> Tensor:
    part = modules.text_encoder if layer.startswith("encoder.") else modules.unet
    weight: Tensor = part.get_submodule(layer).weight
    return weight.detach()


def assert_strength(modules: Modules, plain: Modules, layer: str, strength: float) -> None:
    """W' = W + strength · up @ down."""
    up, down = factors(WIDTHS[layer])
    torch.testing.assert_close(weight_of(modules, layer), weight_of(plain, layer) + strength * up @ down)


def write_peft(folder: Path, config: Mapping[str, Any] | None, layer: str = QUERY) -> Path:
    """As PEFT's `save_pretrained` does."""
    up, down = factors(WIDTHS[layer])
    prefix = f"base_model.model.{layer}"
    folder.mkdir(exist_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file({f"{prefix}.lora_B.weight": up, f"{prefix}.lora_A.weight": down}, path)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return path


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"lora_alpha": 16}, 4),
        ({"lora_alpha": 4}, 1),
        ({}, 8 / RANK),  # PEFT's default
        ({"lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(RANK)),
        ({"lora_alpha": 16, "r": 64, "rank_pattern": {"to_q": RANK}}, 4),
        ({"lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {r"down_blocks\.\d+.*to_q": 12}}, 3),
        ({"lora_alpha": 16, "alpha_pattern": {"attn2.to_q": 2, "o_q": 1}}, 4),
    ],
)
@pytest.mark.parametrize("where", ["beside", "metadata"])
def test_the_strength_of_peft_is_alpha_over_rank(
    families: Families, plain: Modules, tmp_path: Path, config: dict[str, Any], strength: float, where: str
) -> None:
    path = write_peft(tmp_path, config)
    if where == "metadata":
        (tmp_path / "adapter_config.json").unlink()
        up, down = factors(16)
        own = {f"unet.{key}": value for key, value in {"lora_alpha": 8, **config}.items()}
        tensors = {f"unet.{QUERY}.lora_B.weight": up, f"unet.{QUERY}.lora_A.weight": down}
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(own)})
    assert_strength(fuse(families, path, scale=0.5), plain, QUERY, 0.5 * strength)


def test_a_folder_of_peft_is_taken_with_its_config_and_decides_the_export(families: Families, tmp_path: Path) -> None:
    write_peft(tmp_path / "style", {"lora_alpha": 16})
    lora = Lora.parse(f"{tmp_path / 'style'}:0.5")
    assert (lora.path, lora.scale) == (tmp_path / "style" / "adapter_model.safetensors", 0.5)
    before = find_checkpoint(str(families("sd1")), loras=[lora]).source
    write_peft(tmp_path / "style", {"lora_alpha": 8})
    assert find_checkpoint(str(families("sd1")), loras=[lora]).source != before


def test_folders_without_one_lora_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors or pytorch_lora_weights"):
        Lora.parse(str(tmp_path))
    write_peft(tmp_path / "unet", {})
    write_peft(tmp_path / "text_encoder", {}, TEXT)
    with pytest.raises(CheckpointError, match=rf"pass --lora {tmp_path}/unet and --lora {tmp_path}/text_encoder\."):
        Lora.parse(str(tmp_path))
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "unet" / "adapter_model.safetensors").unlink()
    (tmp_path / "text_encoder" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files: write FILE\.safetensors .* of one"):
        Lora.parse(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (None, r"keeps the strength \(lora_alpha\) in adapter_config\.json, and that is not beside it"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4, which altered the model's own"),
        ({"lora_alpha": "much"}, "alphas that cannot be read"),
        ({"lora_alpha": None, "alpha_pattern": [1]}, "alphas that cannot be read"),
        ({"alpha_pattern": {"(": 1}}, "alphas that cannot be read"),
        ({"lora_alpha": float("nan")}, "alpha that is not finite"),
    ],
)
def test_configs_of_peft_that_do_not_say_the_strength_are_refused(
    families: Families, tmp_path: Path, config: dict[str, Any] | None, complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        fuse(families, write_peft(tmp_path, config))
    if config:
        (tmp_path / "adapter_config.json").write_text("[1, 2]")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
            fuse(families, tmp_path / "adapter_model.safetensors")


def test_a_config_beside_a_file_of_another_tool_is_not_of_it(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    up, down = factors(16)
    layer = f"lora_unet_{QUERY.replace('.', '_')}"
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, tmp_path / "style.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64}))
    assert_strength(fuse(families, tmp_path / "style.safetensors"), plain, QUERY, 1)


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (QUERY, "unet.{}.lora_A.default_0.weight", "unet.{}.lora_B.default_0.weight"),
        (QUERY, "unet.{}.lora_A.style.weight", "unet.{}.lora_B.style.weight"),
        (QUERY, "{}.lora_A.default.weight", "{}.lora_B.default.weight"),
        (QUERY, "unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        (QUERY, "lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
        (QUERY, "unet.{p}.processor.to_q_lora.down.weight", "unet.{p}.processor.to_q_lora.up.weight"),
        (QUERY, "{p}.processor.to_q_lora.down.weight", "{p}.processor.to_q_lora.up.weight"),
        (OUT, "unet.{p}.processor.to_out_lora.down.weight", "unet.{p}.processor.to_out_lora.up.weight"),
        (OUT, "lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
        (OUT, "unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        (TEXT, "lora_te_text_model_{_}.lora_down.weight", "lora_te_text_model_{_}.lora_up.weight"),
        (TEXT, "lora_te1_text_model_{_}.lora_down.weight", "lora_te1_text_model_{_}.lora_up.weight"),
        (
            TEXT,
            "text_encoder.text_model.{}.lora_A.default_0.weight",
            "text_encoder.text_model.{}.lora_B.default_0.weight",
        ),
        (TEXT, "text_encoder.{}.lora_A.weight", "text_encoder.{}.lora_B.weight"),
        (
            TEXT,
            "text_encoder.text_model.{}.lora_linear_layer.down.weight",
            "text_encoder.text_model.{}.lora_linear_layer.up.weight",
        ),
        (TEXT, "text_encoder.text_model.{p}.to_q_lora.down.weight", "text_encoder.text_model.{p}.to_q_lora.up.weight"),
        (
            TEXT_OUT,
            "text_encoder.text_model.{p}.to_out_lora.down.weight",
            "text_encoder.text_model.{p}.to_out_lora.up.weight",
        ),
    ],
)
def test_every_way_of_naming_a_layer_is_that_layer(
    families: Families, plain: Modules, tmp_path: Path, layer: str, down: str, up: str
) -> None:
    def named(form: str) -> str:
        parent = layer.removesuffix(".0").rpartition(".")[0]
        return form.replace("{_}", layer.replace(".", "_")).replace("{p}", parent).replace("{}", layer)

    matrices = factors(WIDTHS[layer])
    path = tmp_path / "style.safetensors"
    save_file({named(up): matrices[0], named(down): matrices[1]}, path)
    assert_strength(fuse(families, path), plain, layer, 1)
    alpha = named(down).removesuffix(".down.weight").removesuffix(".lora_down.weight")
    if alpha != named(down):
        save_file({named(up): matrices[0], named(down): matrices[1], f"{alpha}.alpha": torch.tensor(2.0)}, path)
        assert_strength(fuse(families, path), plain, layer, 2 / RANK)


def test_several_adapters_in_a_file_are_refused(families: Families, tmp_path: Path) -> None:
    up, down = factors(16)
    names = [f"unet.{QUERY}.lora_{factor}.{adapter}.weight" for adapter in ("cat", "dog") for factor in "BA"]
    save_file(dict(zip(names, (up, down, up.clone(), down.clone()), strict=True)), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds several adapters \(cat, dog\): save each to a file"):
        fuse(families, tmp_path / "a.safetensors")


def test_a_convolution_of_three_factors_is_fused(families: Families, plain: Modules, tmp_path: Path) -> None:
    layer = plain.unet.mid_block.resnets[0].conv1
    out, channels, *kernel = layer.weight.shape
    up, mid, down = torch.randn(out, 3, 1, 1), torch.randn(3, 2, *kernel), torch.randn(2, channels, 1, 1)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{name}.lora_{kind}.weight": value for kind, value in (("up", up), ("mid", mid), ("down", down))}
    save_file(tensors, tmp_path / "locon.safetensors")
    fused = fuse(families, tmp_path / "locon.safetensors").unet.mid_block.resnets[0].conv1
    image = torch.randn(1, channels, 8, 8)
    with torch.inference_mode():
        convolve = torch.nn.functional.conv2d
        update = convolve(convolve(convolve(image, down), mid, padding=1), up)
        torch.testing.assert_close(fused(image), layer(image) + update, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_name_the_tensor(families: Families, tmp_path: Path, value: float) -> None:
    up, down = factors(16)
    down[1, 2] = value
    save_file({f"unet.{QUERY}.lora_B.weight": up, f"unet.{QUERY}.lora_A.weight": down}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=rf"style\.safetensors holds NaN or infinity in unet\.{QUERY}\.lora_A"):
        fuse(families, tmp_path / "style.safetensors")


def test_a_scale_that_overflows_is_refused(families: Families, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="overflow: pass a smaller scale"):
        fuse(families, write_peft(tmp_path, {"lora_alpha": 16}), scale=1e39)


# The early package `lora`: layers by number


def write_early(path: Path, plain: Modules, *, classes: list[str] | None = None) -> Changes:
    """Write a LoRA in the early form, with a token `<s1>`. Returns its updates."""
    made = make_changes(early_layers(shapes_of(plain)), seed=5, rank=2, strength=1)
    own = {"unet": json.dumps(classes or ["CrossAttention", "Attention", "GEGLU"])}
    write_lora(path, made, "early", metadata={**own, "<s1>": "<embed>"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "<s1>": torch.randn(WIDTH)}, path, metadata=metadata)
    return made


def test_the_early_form_numbers_layers_and_brings_its_tokens(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    updates = write_early(tmp_path / "early.safetensors", plain)
    progress = NoteRecorder()
    checkpoint = find_checkpoint(
        str(families("sd1")), loras=[Lora(tmp_path / "early.safetensors", 0.5)], progress=progress
    )
    assert progress.notes == ["early.safetensors: adds the tokens <s1>, which were trained with the LoRA"]
    assert [learned.token for learned in checkpoint.learned_tokens] == ["<s1>"]
    modules = load(checkpoint)
    assert len(updates) == 4 * 9 + 2 * 4
    for (_, name), factors in updates.items():
        wanted = weight_of(plain, name) + 0.5 * factors.product()
        torch.testing.assert_close(weight_of(modules, name), wanted)
    assert modules.text_encoder.get_input_embeddings().num_embeddings == (
        plain.text_encoder.get_input_embeddings().num_embeddings + 1
    )


def test_a_file_given_as_lora_and_as_embedding_keeps_the_name_of_the_embedding(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    path = tmp_path / "early.safetensors"
    write_early(path, plain)
    found = find_checkpoint(str(families("sd1")), loras=[Lora(path)], embeddings=[Embedding(path, "<disney>")])
    assert [learned.token for learned in found.learned_tokens] == ["<disney>"]


def test_early_layers_within_unknown_classes_are_refused(families: Families, plain: Modules, tmp_path: Path) -> None:
    write_early(tmp_path / "early.safetensors", plain, classes=["CrossAttention", "ResnetBlock2D"])
    with pytest.raises(CheckpointError, match="within ResnetBlock2D, whose order is not known"):
        fuse(families, tmp_path / "early.safetensors")


def test_an_early_file_with_tokens_alone_is_an_embedding(tmp_path: Path) -> None:
    save_file({"<s1>": torch.zeros(8)}, tmp_path / "tokens.safetensors", metadata={"<s1>": "<embed>"})
    with pytest.raises(CheckpointError, match="holds learned tokens and no LoRA: pass it with --embedding"):
        check_lora(tmp_path / "tokens.safetensors")


@pytest.mark.parametrize(("file", "tokens"), [("analog_svd_rank4", []), ("lora_disney", ["<s1>", "<s2>"])])
def test_real_early_loras_fit_the_layers_of_sd1(file: str, tokens: list[str]) -> None:
    """The shapes of 144 layers follow one another as the numbers say; the text encoder's are all alike."""
    path = DATA / "loras" / f"{file}.safetensors"
    if not path.is_file():
        pytest.skip(f"the real LoRA {path.name} is not here")
    check_lora(path)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    layers = {
        Target(layer.part, layer.name): Shape(layer.outputs, layer.inputs)
        for layer in (*updated_layers("unet", unet), *updated_layers("text_encoder", encoder))
    }
    found = outline(read_lora_header(path), layers)
    assert (found.form, len(found.ranks)) == ("early", 144 + 48)
    learned = Embedding(path).learned_tokens if tokens else ()
    assert [(token.token, token.vectors, token.widths) for token in learned] == [(token, 1, (768,)) for token in tokens]


@pytest.mark.parametrize(("file", "token"), [("cat-toy", "<cat-toy>"), ("gta5-artwork", "<gta5-artwork>")])
def test_real_embeddings_are_read(file: str, token: str) -> None:
    path = DATA / "embeddings" / f"{file}.safetensors"
    if not path.is_file():
        pytest.skip(f"the real embedding {path.name} is not here")
    (learned,) = Embedding(path).learned_tokens
    assert (learned.token, learned.vectors, learned.widths) == (token, 1, (768,))


def test_real_embeddings_fit_sd1_and_their_vectors_are_added(tmp_path: Path) -> None:
    paths = sorted((DATA / "embeddings").glob("*.safetensors"))
    if not paths:
        pytest.skip("the real embeddings are not here")
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=600, hidden_size=768, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    write_tokenizer(tmp_path, ["a cat"])
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    embeddings = [Embedding(path) for path in paths]
    add_to_tokenizer(tokenizer, [learned for embedding in embeddings for learned in embedding.learned_tokens])
    add_to_text_encoders([encoder], embeddings, tokenizer)
    for path in paths:
        ((token, vector),) = load_file(path).items()
        row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)]
        torch.testing.assert_close(row, vector[0])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("style.pt", r"pickle, and loading one can run code\. Convert it"),
        ("a/pytorch_lora_weights.bin:0.5", r"pickle, and loading one can run code\. Convert it"),
        ("owner/style", "Download it if it is a hub id"),
        ("owner/style:0.5", "Download it if it is a hub id"),
    ],
)
def test_what_is_no_safetensors_file_gets_a_hint(text: str, hint: str) -> None:
    with pytest.raises(CheckpointError, match=hint):
        Lora.parse(text)


def test_embeddings_in_folders_and_other_forms(families: Families, tmp_path: Path) -> None:
    vectors = torch.randn(3, WIDTH)
    save_file({"<cat>": vectors}, tmp_path / "learned_embeds.safetensors")
    assert Embedding.parse(str(tmp_path)) == Embedding(tmp_path / "learned_embeds.safetensors")
    with pytest.raises(CheckpointError, match=r"If it is a hub id, download learned_embeds\.safetensors from it"):
        Embedding.parse("owner/concept")
    with pytest.raises(CheckpointError, match=r"is a pickle.* AUTOMATIC1111's files .*string_to_param"):
        Embedding.parse("style.pt")
    save_file({"string_to_param.*": vectors}, tmp_path / "zebra.safetensors")
    (learned,) = Embedding(tmp_path / "zebra.safetensors").learned_tokens
    assert (learned.token, learned.vectors) == ("zebra", 3)
    vectors[1, 1] = math.nan
    save_file({"<cat>": vectors}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(CheckpointError, match=r"learned_embeds\.safetensors holds NaN or infinity in <cat>"):
        load(find_checkpoint(str(families("sd1")), embeddings=[Embedding(tmp_path / "learned_embeds.safetensors")]))
