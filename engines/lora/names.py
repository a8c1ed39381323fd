"""The names of a LoRA's tensors: which layer each updates, in the conventions of different training tools."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from engines.lora.early import early_names
from engines.lora.sgm import sgm_names
from engines.manifest import LoraPart

Kind = Literal["down", "up", "mid", "alpha"]
Form = Literal["kohya", "peft", "diffusers", "early"]
_KINDS: Mapping[str, Kind] = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid", "alpha": "alpha"}
_PEFT_ALONE = "base_model.model."  # the prefix of tensors in files that PEFT itself has written
_FACTORS: tuple[tuple[Form, re.Pattern[str]], ...] = (
    ("kohya", re.compile(r"(?P<layer>.+)\.lora_(?P<kind>down|up|mid)\.weight")),
    ("diffusers", re.compile(r"(?P<layer>.+)\.lora_(?P<kind>[AB])(\.(?P<adapter>[^.]+))?\.weight")),  # PEFT's names
    ("diffusers", re.compile(r"(?P<layer>.+?)(\.lora|\.lora_linear_layer|_lora)\.(?P<kind>down|up)\.weight")),
    ("kohya", re.compile(r"(?P<layer>.+?)(\.lora|\.lora_linear_layer|_lora)?\.(?P<kind>alpha)")),
    ("early", re.compile(r"(?P<layer>(unet|text_encoder):\d+):(?P<kind>down|up)")),  # the package `lora`, by number
)
_TEXT_PREFIXES: Mapping[LoraPart, tuple[str, ...]] = {
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Target(NamedTuple):
    """A layer of the model, by the name of its module within its part."""

    part: LoraPart
    name: str


@dataclass(frozen=True, slots=True)
class Factor:
    """What a tensor is: the factor `down` or `up` of a layer's update, `mid` between them, or its `alpha`."""

    layer: str  # by the file's name for it
    kind: Kind
    form: Form
    adapter: str | None = None  # PEFT's name of it, where several may lie in a file


def read_name(name: str) -> Factor | None:
    """Return what the tensor with this name is; None where it is no part of a LoRA."""
    for form, pattern in _FACTORS:
        if found := pattern.fullmatch(name):
            named = found.groupdict()
            layer = named["layer"].removeprefix(_PEFT_ALONE).replace(".processor.", ".")
            made_by: Form = "peft" if name.startswith(_PEFT_ALONE) else form
            return Factor(layer, _KINDS[named["kind"]], made_by, named.get("adapter"))
    return None


def written_by_peft(names: Iterable[str]) -> bool:
    """Whether PEFT itself wrote tensors of these names: diffusers leaves out their prefix."""
    return any(name.startswith(_PEFT_ALONE) for name in names)


def targets_by_name(targets: Iterable[Target], metadata: Mapping[str, str]) -> dict[str, Sequence[Target]]:
    """Return every layer that a LoRA may update under each name that files have for it.

    A name is of several layers where it does not say which text encoder it means.

    Args:
        targets: the layers, those of each part in the order of its modules.
        metadata: the file's, in which the early package names the classes whose layers it has numbered.

    Raises:
        CheckpointError: those classes are not known.
    """
    targets = tuple(targets)
    named = dict(_aliases(targets))
    for part in ("unet", "text_encoder"):
        own = [target.name for target in targets if target.part == part]
        for number, name in enumerate(early_names(part, own, metadata)):
            named[f"{part}:{number}"] = [Target(part, name)]
    return named


@lru_cache(maxsize=8)  # of the models of a server: a folder has many files for each
def _aliases(targets: tuple[Target, ...]) -> Mapping[str, Sequence[Target]]:
    numbered = sgm_names([target.name for target in targets if target.part == "unet"])
    named = defaultdict[str, list[Target]](list)
    for target in targets:
        aliases = _unet_names(target.name, numbered) if target.part == "unet" else _text_names(target)
        for alias in dict.fromkeys(aliases):
            named[alias].append(target)
    return named


def _unet_names(name: str, numbered: Mapping[str, str]) -> Iterator[str]:
    for short in (name, name.removesuffix(".0")):  # attention processors leave it out of to_out.0
        yield from (short, f"unet.{short}", f"lora_unet_{short.replace('.', '_')}")
    if name in numbered:
        yield f"lora_unet_{numbered[name].replace('.', '_')}"


def _text_names(target: Target) -> Iterator[str]:
    """The names of a text encoder's layer. transformers has removed the wrapper `text_model` from some."""
    part, name = target.part, target.name.removeprefix("text_model.")
    *path, last = name.split(".")
    for full in (f"text_model.{name}", name):
        yield from (full, f"{part}.{full}")
        yield from (f"{prefix}_{full.replace('.', '_')}" for prefix in _TEXT_PREFIXES[part])
    if last in _OLD_TEXT:
        old = ".".join((*path, _OLD_TEXT[last]))
        yield from (f"text_model.{old}", f"{part}.text_model.{old}", f"{part}.{old}")
