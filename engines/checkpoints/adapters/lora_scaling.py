"""How strongly a LoRA that PEFT trained is scaled: its `adapter_config.json`, or the copy in a file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.checkpoints.errors import CheckpointError
from engines.checkpoints.safetensors_header import read_header

_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # where diffusers puts the same, with the part in front of each key
_PARTS = ("unet", "text_encoder")
_PEFT = re.compile(r"\.lora_[AB]\.")
_PEFT_ALONE = "base_model.model."  # the prefix of tensors in files that PEFT itself has written
_ALTER_THE_MODEL = ("pissa", "olora", "corda", "loftq")  # beginnings of `init_lora_weights`


@dataclass(frozen=True)
class Scaling:
    """PEFT's scale of an update, by the layer that it updates."""

    alpha: float | None = None  # None: the rank
    alphas: Mapping[str, float] = field(default_factory=dict)  # of some layers, by the end of their name or a pattern
    rank_stabilized: bool = False

    def of(self, layer: str, rank: int) -> float:
        """alpha / rank, Hu et al. (2021), section 4.1; or alpha / √rank, Kalajdzievski (2023), eq. 7."""
        named = (alpha for key, alpha in self.alphas.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
        alpha = next(named, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def adapter_config_file(path: Path) -> Path | None:
    """The `adapter_config.json` beside the LoRA at `path`; None where there is none, or it is not of this file."""
    config = path.with_name(_CONFIG)
    if not config.is_file() or not path.is_file():
        return None
    shapes, metadata = read_header(path)
    return config if _METADATA not in metadata and any(map(_PEFT.search, shapes)) else None


def read_scaling(path: Path) -> dict[str, Scaling]:
    """Return the scaling of each part's updates in the LoRA at `path`, where their alphas are not tensors beside them.

    Raises:
        CheckpointError: the config is missing or cannot be read, or it was trained in a way that is not supported.
    """
    shapes, metadata = read_header(path)
    if _METADATA in metadata:
        config = _parsed(metadata[_METADATA], f"the metadata of {path}")
        return {part: _scaling(_of_part(config, part), path) for part in _PARTS}
    if beside := adapter_config_file(path):
        config = _parsed(_text(beside), str(beside))
        return dict.fromkeys(_PARTS, _scaling({"lora_alpha": 8, **config}, beside))  # PEFT's default
    if any(key.startswith(_PEFT_ALONE) for key in shapes):
        raise CheckpointError(
            f"{path.name} was written by PEFT, which keeps the strength (lora_alpha) in {_CONFIG}, and that is not "
            f"beside it: download {_CONFIG} to the same folder."
        )
    return dict.fromkeys(_PARTS, Scaling())


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The options of one part; those without a part are everyone's."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return {key: value for key, value in config.items() if "." not in key} | own


def _scaling(config: Mapping[str, Any], source: Path) -> Scaling:
    _check_supported(config, source.name)
    try:
        alpha, alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        found = Scaling(
            alpha=None if alpha is None else float(alpha),
            alphas={key: float(value) for key, value in alphas.items()},
            rank_stabilized=bool(config.get("use_rslora")),
        )
        for key in found.alphas:
            re.compile(key)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{source} has alphas that cannot be read ({error}): lora_alpha must be a number, alpha_pattern numbers by "
            "layer."
        ) from error
    if not all(map(math.isfinite, (*found.alphas.values(), found.alpha or 0))):
        raise CheckpointError(f"{source} has an alpha that is not finite: download it again.")
    return found


def _check_supported(config: Mapping[str, Any], name: str) -> None:
    if (kind := str(config.get("peft_type") or "LORA")).upper() != "LORA":
        raise CheckpointError(f"{name} is of an adapter of type {kind}, and only LoRAs can be fused.")
    if config.get("use_dora"):
        raise CheckpointError(f"{name} says use_dora: a DoRA also rescales the weights, which is not supported.")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_ALTER_THE_MODEL):
        raise CheckpointError(
            f"{name} says init_lora_weights {begun}, which altered the model's own weights too: convert it to a plain "
            "LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)."
        )


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source} cannot be read ({error}): download it again.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
