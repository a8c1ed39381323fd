"""LoRA files in every form that the build and the server read, with random updates of a model's layers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.checkpoints.loading.modules import Modules
from engines.lora.names import Target
from engines.lora.sgm import sgm_names
from engines.manifest import LoraPart, Manifest

FileForm = Literal["kohya", "kohya-sgm", "peft", "diffusers", "diffusers-old", "early"]
# Those of Stable Diffusion XL have kohya's names by the blocks of two UNets, and a text encoder more.
XL_FORMS: tuple[FileForm, ...] = ("kohya", "kohya-sgm", "diffusers", "diffusers-old")
FORMS: tuple[FileForm, ...] = tuple(form for form in get_args(FileForm) if form != "kohya-sgm")
_KOHYA: Mapping[LoraPart, str] = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


class Factors(NamedTuple):
    """Of one layer: [out, r, …] and [r, in, …kernel]."""

    up: Tensor
    down: Tensor

    def product(self) -> Tensor:
        """[out, in, …kernel]."""
        return torch.einsum("or,r...->o...", self.up.flatten(1), self.down)


Changes = Mapping[Target, Factors]
Shapes = Mapping[Target, tuple[int, ...]]


def shapes_in(manifest: Manifest) -> Shapes:
    """The shapes of the weights that LoRAs of requests update."""
    return {Target(layer.part, layer.name): (layer.outputs, layer.inputs) for layer in manifest.lora_layers}


def shapes_of(modules: Modules) -> Shapes:
    """The shapes of every weight that a fused LoRA may update, convolutions included."""
    return {
        Target(part, name): tuple(layer.weight.shape)
        for part, module in modules.lora_parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def make_changes(shapes: Shapes, *, seed: int, rank: int = 4, strength: float = 0.1) -> dict[Target, Factors]:
    """Random factors, normal with the deviation `strength`, for each of the layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        target: Factors(
            up=strength * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator),
            down=strength * torch.randn(rank, *shape[1:], generator=generator),
        )
        for target, shape in shapes.items()
    }


def early_layers(shapes: Shapes) -> Shapes:
    """Those that the early package updates, in the order of its numbers, in the tiny checkpoint `sd1`."""
    blocks = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    blocks += ["mid_block.attentions.0"]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = (*(f"attn1.{one}" for one in attention), "ff.net.0.proj", *(f"attn2.{one}" for one in attention))
    unet = [Target("unet", f"{block}.transformer_blocks.0.{layer}") for block in blocks for layer in layers]
    text = [
        Target("text_encoder", f"encoder.layers.{n}.self_attn.{x}_proj")
        for n in range(2)
        for x in ("k", "v", "q", "out")
    ]
    return {target: shapes[target] for target in (*unet, *text)}


def write_lora(
    path: Path,
    changes: Changes,
    form: FileForm = "kohya",
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    beside: Iterable[str] = (),
) -> Path:
    """Write W += alpha / rank · up · down as a tool does. Forms that have no alpha have it in `up`.

    Args:
        path: of the file; PEFT's `adapter_config.json` lies beside it.
        changes: factors by layer; in the early form those of `early_layers`, in that order.
        form: the tool's.
        alpha: of every layer. None: the rank.
        dtype: of the tensors.
        metadata: to add.
        beside: layers of the UNet that are not updated; in SGM's form they are numbered with the others.
    """
    rank = max(len(factors.down) for factors in changes.values())
    alpha = float(rank if alpha is None else alpha)
    tensors: dict[str, Tensor] = {}
    numbered = sgm_names([*(target.name for target in changes if target.part == "unet"), *beside])
    for target, factors in changes.items():
        scale = 1 if form in ("kohya", "kohya-sgm", "peft", "diffusers") else alpha / len(factors.down)
        up, down = _names(target, form, changes, numbered)
        tensors |= {up: (scale * factors.up).to(dtype), down: factors.down.to(dtype)}
        if form in ("kohya", "kohya-sgm"):
            tensors[up.replace("lora_up.weight", "alpha")] = torch.tensor(alpha).to(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"r": rank, "lora_alpha": alpha}
    if form == "peft":
        path.with_name("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    save_file(tensors, path, metadata={**_metadata(form, config, changes), **(metadata or {})})
    return path


def _names(target: Target, form: FileForm, changes: Iterable[Target], numbered: Mapping[str, str]) -> tuple[str, str]:
    """Of the tensors up and down."""
    inner = target.name.removeprefix("text_model.")
    full = target.name if target.part == "unet" or inner == "text_projection" else f"text_model.{inner}"
    if form in ("kohya", "kohya-sgm"):
        named = numbered[full] if form == "kohya-sgm" and target.part == "unet" else full
        layer = f"{_KOHYA[target.part]}_{named.replace('.', '_')}"
        return f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
    if form == "peft":
        return f"base_model.model.{full}.lora_B.weight", f"base_model.model.{full}.lora_A.weight"
    if form == "diffusers":
        return f"{target.part}.{full}.lora_B.weight", f"{target.part}.{full}.lora_A.weight"
    if form == "early":
        number = [other for other in changes if other.part == target.part].index(target)
        return f"{target.part}:{number}:up", f"{target.part}:{number}:down"
    if target.part != "unet":
        layer = f"{target.part}.{full}.lora_linear_layer"
    elif ".attn" in full:
        parent, _, last = full.removesuffix(".0").rpartition(".")
        layer = f"unet.{parent}.processor.{last}_lora"
    else:
        layer = f"unet.{full}.lora"
    return f"{layer}.up.weight", f"{layer}.down.weight"


def _metadata(form: FileForm, config: Mapping[str, float], changes: Iterable[Target]) -> dict[str, str]:
    parts = sorted({target.part for target in changes})
    if form == "diffusers":
        own: dict[str, object] = {f"{part}.{key}": value for part in parts for key, value in config.items()}
        own |= {f"{part}.target_modules": [name for of, name in changes if of == part] for part in parts}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(own)}
    if form == "early":
        return {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"]), "text_encoder": '["CLIPAttention"]'}
    return {}
