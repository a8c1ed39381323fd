"""The names of a LoRA's tensors: which layer each updates, in the conventions of different training tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from engines.checkpoints.errors import CheckpointError

Layer = nn.Linear | nn.Conv2d
_KINDS = {"A": "down", "B": "up"}  # PEFT's names of the factors
_FACTORS = tuple(
    map(
        re.compile,
        (
            r"(?P<layer>.+)\.lora_(?P<kind>down|up|mid)\.weight",  # kohya
            r"(?P<layer>.+)\.lora_(?P<kind>[AB])(\.(?P<adapter>[^.]+))?\.weight",  # PEFT
            r"(?P<layer>.+?)(\.lora|\.lora_linear_layer|_lora)\.(?P<kind>down|up)\.weight",  # diffusers
            r"(?P<layer>.+?)(\.lora|\.lora_linear_layer|_lora)?\.(?P<kind>alpha)",
            r"(?P<layer>(unet|text_encoder):\d+):(?P<kind>down|up)",  # the early package `lora`, by number
        ),
    )
)
# The early package's layers within what it calls by these class names, in the order of its numbers.
_EARLY_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_EARLY_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True, slots=True)
class Factor:
    """What a tensor is: the factor `down` or `up` of a layer's update, `mid` between them, or its `alpha`."""

    layer: str  # by the file's name for it
    kind: str
    adapter: str | None = None  # PEFT's name of it, where several may lie in a file


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the model."""

    part: str
    name: str  # within its part
    module: Layer


def read_name(name: str) -> Factor | None:
    """Return what the tensor with this name is; None where it is no part of a LoRA."""
    found = next(filter(None, (pattern.fullmatch(name) for pattern in _FACTORS)), None)
    if found is None:
        return None
    named = found.groupdict()
    layer = named["layer"].removeprefix("base_model.model.").replace(".processor.", ".")
    return Factor(layer, _KINDS.get(named["kind"], named["kind"]), named.get("adapter"))


def layers_by_name(unet: nn.Module, text_encoder: nn.Module, metadata: Mapping[str, str]) -> dict[str, Target]:
    """Return every layer that a LoRA may update under each name that files have for it.

    Args:
        unet: a diffusers UNet.
        text_encoder: a transformers CLIPTextModel.
        metadata: the file's, in which the early package names the classes whose layers it has numbered.

    Raises:
        CheckpointError: those classes are not known.
    """
    named: dict[str, Target] = {}
    for name, layer in _updatable(unet):
        target = Target("unet", name, layer)
        for short in dict.fromkeys((name, name.removesuffix(".0"))):  # attention processors leave it out of to_out.0
            aliases = (short, f"unet.{short}", f"lora_unet_{short.replace('.', '_')}")
            named.update((alias, target) for alias in aliases if alias not in named)
    for name, layer in _updatable(text_encoder):
        named |= dict.fromkeys(_text_names(name), Target("text_encoder", name, layer))
    return named | _early_names(unet, text_encoder, metadata)


def _text_names(name: str) -> Iterator[str]:
    """The names of a text encoder's layer, whose wrapper `text_model` transformers has removed."""
    *path, last = name.split(".")
    for full in (f"text_model.{name}", name):
        yield from (full, f"text_encoder.{full}")
        yield from (f"{prefix}_{full.replace('.', '_')}" for prefix in ("lora_te", "lora_te1"))
    if last in _OLD_TEXT:
        old = ".".join((*path, _OLD_TEXT[last]))
        yield from (f"text_model.{old}", f"text_encoder.text_model.{old}", f"text_encoder.{old}")


def _early_names(unet: nn.Module, text_encoder: nn.Module, metadata: Mapping[str, str]) -> dict[str, Target]:
    """The numbers of the early package: in the order in which diffusers 0.10 made the layers, the middle block last."""
    parts = {
        "unet": (unet, _early_unet(unet, _classes("unet", metadata))),
        "text_encoder": (text_encoder, _early_text(text_encoder, _classes("text_encoder", metadata))),
    }
    named: dict[str, Target] = {}
    for part, (module, names) in parts.items():
        layers = dict(_updatable(module))
        named |= {f"{part}:{number}": Target(part, name, layers[name]) for number, name in enumerate(names)}
    return named


def _early_unet(unet: nn.Module, classes: frozenset[str]) -> Iterator[str]:
    blocks = [name for name, _ in unet.named_modules() if re.fullmatch(r".*\.transformer_blocks\.\d+", name)]
    for block in sorted(blocks, key=_early_place):
        attends = classes & {"CrossAttention", "Attention"}
        yield from (f"{block}.attn1.{layer}" for layer in _EARLY_ATTENTION if attends)
        yield from (f"{block}.ff.net.0.proj" for _ in classes & {"GEGLU"})
        yield from (f"{block}.attn2.{layer}" for layer in _EARLY_ATTENTION if attends)


def _early_place(name: str) -> int:
    return ("down_blocks", "up_blocks", "mid_block").index(name.split(".", maxsplit=1)[0])


def _early_text(text_encoder: nn.Module, classes: frozenset[str]) -> Iterator[str]:
    for name, _ in text_encoder.named_modules():
        if name.endswith(".self_attn"):
            yield from (f"{name}.{layer}" for layer in _EARLY_TEXT if classes)


def _classes(part: str, metadata: Mapping[str, str]) -> frozenset[str]:
    """The classes whose layers the early package has numbered. Raises CheckpointError for unknown ones."""
    known = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}[part]
    if part not in metadata:
        return frozenset(known)
    try:
        classes = frozenset(map(str, json.loads(metadata[part])))
    except (ValueError, TypeError):
        classes = frozenset({metadata[part]})
    if unknown := sorted(classes - known):
        raise CheckpointError(
            f"the LoRA numbers layers of the {part} within {', '.join(unknown)}, whose order is not known: "
            f"supported are {', '.join(sorted(known))}."
        )
    return classes


def _updatable(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, Layer):
            yield name, layer
