"""How strongly a LoRA that PEFT trained is scaled: its `adapter_config.json`, or the copy in a file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from engines.lora.names import Target, written_by_peft
from engines.manifest import LoraPart

ADAPTER_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # where diffusers puts the same, with the part in front of each key
_PARTS: tuple[LoraPart, ...] = ("unet", "text_encoder", "text_encoder_2")
_PEFT = re.compile(r"\.lora_[AB]\.")
_LARGEST_CONFIG = 1 << 20  # bytes
_MOST_PATTERNS = 2000  # diffusers writes one for each layer
_MOST_REPEATS = 2  # in one pattern, on names of some 80 characters
_LONGEST = 200  # characters of a pattern, and of what a message repeats
_ALTER_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of `init_lora_weights`


@dataclass(frozen=True)
class Scaling:
    """PEFT's scale of an update, by the layer that it updates."""

    alpha: float | None = None  # None: the rank
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()  # of layers whose names match; the first that does
    rank_stabilized: bool = False

    def of(self, target: Target, rank: int) -> float:
        """alpha / rank, Hu et al. (2021), section 4.1; or alpha / √rank, Kalajdzievski (2023), eq. 7."""
        names = (target.name, f"text_model.{target.name}")[: 1 + (target.part == "text_encoder")]
        named = (alpha for pattern, alpha in self.alphas if any(map(pattern.fullmatch, names)))
        alpha = next(named, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def adapter_config_beside(path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The text of `adapter_config.json` beside the LoRA at `path`; None where there is none, or it is not of this file.

    Args:
        path: of the LoRA.
        names: of its tensors.
        metadata: its own.

    Raises:
        CheckpointError: it cannot be read.
    """
    config = path.with_name(ADAPTER_CONFIG)
    if _METADATA in metadata or not any(map(_PEFT.search, names)) or not config.is_file():
        return None
    try:
        with config.open("rb") as file:
            content = file.read(_LARGEST_CONFIG + 1)
        if len(content) > _LARGEST_CONFIG:
            raise ValueError("it is too large")
        return content.decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} cannot be read: {error}") from error


def scaling_of(
    name: str, names: Iterable[str], metadata: Mapping[str, str], config: str | None
) -> Mapping[LoraPart, Scaling]:
    """Return the scaling of each part's updates in a LoRA, where their alphas are not tensors beside them.

    Args:
        name: the file's.
        names: of its tensors.
        metadata: its own.
        config: the text of `adapter_config.json` beside it.

    Raises:
        CheckpointError: the config is missing or cannot be read, or it was trained in a way that is not supported.
    """
    if _METADATA in metadata:
        parsed = _parsed(metadata[_METADATA], f"the metadata of {name}")
        return {part: _scaling(_of_part(parsed, part), name) for part in _PARTS}
    if config is not None:
        parsed = _parsed(config, ADAPTER_CONFIG)
        return dict.fromkeys(_PARTS, _scaling({"lora_alpha": 8, **parsed}, ADAPTER_CONFIG))  # PEFT's default
    if written_by_peft(names):
        raise CheckpointError(
            f"{name} was written by PEFT, which keeps the strength (lora_alpha) in {ADAPTER_CONFIG}, and that is not "
            f"beside it: download {ADAPTER_CONFIG} to the same folder."
        )
    return dict.fromkeys(_PARTS, Scaling())


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The options of one part; those without a part are everyone's."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return {key: value for key, value in config.items() if "." not in key} | own


def _scaling(config: Mapping[str, Any], source: str) -> Scaling:
    _check_supported(config, source)
    try:
        alpha, alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if len(alphas) > _MOST_PATTERNS:
            raise ValueError(f"{len(alphas)} patterns, and at most {_MOST_PATTERNS} are read")
        found = Scaling(
            alpha=None if alpha is None else float(alpha),
            alphas=tuple((_pattern(key), float(value)) for key, value in alphas.items()),
            rank_stabilized=bool(config.get("use_rslora")),
        )
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{source} has alphas that cannot be read ({str(error)[:_LONGEST]}): lora_alpha must be a number, "
            "alpha_pattern numbers by layer."
        ) from error
    if not all(map(math.isfinite, (*(value for _, value in found.alphas), found.alpha or 0))):
        raise CheckpointError(f"{source} has an alpha that is not finite: download it again.")
    return found


def _pattern(key: str) -> re.Pattern[str]:
    """The names that a key of PEFT's `alpha_pattern` means: it is the end of them, or a pattern of it.

    Raises:
        ValueError: matching it might take for ever, as expressions do that repeat what repeats.
        re.error: it is no regular expression.
    """
    if len(key) > _LONGEST or len(re.findall(r"[*+{]", key)) > _MOST_REPEATS or re.search(r"\)[*+{]", key):
        raise ValueError(f"{key!r} repeats too much")
    return re.compile(rf"(.*\.)?({key})")


def _check_supported(config: Mapping[str, Any], name: str) -> None:
    if (kind := str(config.get("peft_type") or "LORA")).upper() != "LORA":
        raise CheckpointError(f"{name} is of an adapter of type {kind[:_LONGEST]}, and only LoRAs can be fused.")
    if config.get("use_dora"):
        raise CheckpointError(f"{name} says use_dora: a DoRA also rescales the weights, which is not supported.")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(_ALTER_THE_MODEL):
        raise CheckpointError(
            f"{name} says init_lora_weights {begun[:_LONGEST]}, which altered the model's own weights too: convert it "
            "to a plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)."
        )


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} cannot be read (it is no object of JSON): download it again.")
    return config
