"""Converts a diffusers folder to a single file with the names of Stable Diffusion's first release, or of XL's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Names = tuple[tuple[str, str], ...]  # replacements in tensor names: old, new

_RESNET: Names = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_UNET: Names = (
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
)
_VAE: Names = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".resnets.", ".block."),
)
_OPEN_CLIP: Names = (
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("self_attn", "attn"),
)


def single_file(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint in `folder` under their names in single files of SD 1.x, 2.x or XL."""
    unet, text, vae = (_config(folder, part) for part in ("unet", "text_encoder", "vae"))
    layers, blocks = unet["layers_per_block"], len(vae["block_out_channels"])
    tensors = _read(folder, "unet", "diffusion_pytorch_model")
    attentions = {key.split(".")[1] for key in tensors if key.startswith("up_blocks.") and ".attentions." in key}
    made = {f"model.diffusion_model.{_unet(key, layers, attentions)}": value for key, value in tensors.items()}
    for key, value in _read(folder, "vae", "diffusion_pytorch_model").items():
        kernel = value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value
        made[f"first_stage_model.{_vae(key, blocks)}"] = kernel
    encoder = _read(folder, "text_encoder", "model")
    if (folder / "text_encoder_2").is_dir():
        second = _read(folder, "text_encoder_2", "model")
        return (
            made
            | dict(_clip(encoder, "conditioner.embedders.0.transformer."))
            | dict(_open_clip(second, "conditioner.embedders.1.model."))
        )
    if text["hidden_act"] == "gelu":
        return made | dict(_open_clip(encoder, "cond_stage_model.model."))
    return made | dict(_clip(encoder, "cond_stage_model.transformer."))


def write_single_file(folder: Path, path: Path) -> Path:
    """Write the checkpoint in `folder` to the .safetensors or, for any other suffix, pickled file at `path`."""
    tensors = {name: value.contiguous() for name, value in single_file(folder).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def _config(folder: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return config


def _read(folder: Path, part: str, stem: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / part / f"{stem}.safetensors")
    return tensors


def _rename(key: str, names: Names) -> str:
    for old, new in names:
        key = key.replace(old, new)
    return key


def _unet(key: str, layers: int, attentions: set[str]) -> str:
    """Number all blocks in sequence: a down block is its layers and a downsampler, an up block has one more layer."""
    if ".resnets." in key:
        key = _rename(key, _RESNET)
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
    if not found:
        return _rename(key, _UNET)
    direction, block, kind, layer, rest = found.groups()
    first = int(block) * (layers + 1) + (direction == "down")
    side = "input" if direction == "down" else "output"
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if block in attentions else 1}.{rest}"
    return f"{side}_blocks.{first + int(layer)}.{0 if kind == 'resnets' else 1}.{rest}"


def _vae(key: str, blocks: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", key)
    return _rename(key.replace("down_blocks.", "down."), _VAE)


def _clip(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in tensors.items():
        yield f"{prefix}text_model.{key.removeprefix('text_model.')}", value


def _open_clip(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP stores the projections to query, key and value as one matrix, and transposes the last one."""
    for key, value in tensors.items():
        name = f"{prefix}{_rename(key.removeprefix('text_model.'), _OPEN_CLIP)}"
        name = re.sub(r"(\.\d+)\.(c_fc|c_proj)", r"\1.mlp.\2", name)
        if re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            joined = [tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            yield name.replace(".q_proj.", ".in_proj_"), torch.cat(joined)
        elif key == "text_projection.weight":
            yield name.removesuffix(".weight"), value.T
        else:
            yield name, value
