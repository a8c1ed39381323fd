"""Which distillation a checkpoint is of, as far as it says so itself. Reads no weights.

Published LoRAs have headers that hold nothing but the shapes of their tensors, so that their names are all there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.checkpoint import Checkpoint
from engines.lora.file import read_lora_header
from engines.lora.hints import printable
from engines.safetensors_header import read_header

# Names of published files and hub ids, without separators, and the preset that their model cards describe.
_LORAS: Mapping[str, str] = {
    r"sdxllightning([248])steps?(lora)?": r"lightning-\1",
    r"hypersd(?:15|xl)([1248])steps?lora": r"hyper-\1",
    r"hypersd(?:15|xl)(8|12)stepscfglora": r"hyper-\1-cfg",
    r"lcmlora(sdv15|sdxl|ssd1b)": "lcm-lora",
    r"tcd(sd15|sd21base|sdxl)lora": "tcd",
    r"dmd2sdxl4steplora": "dmd2",
}
_CHECKPOINTS: Mapping[str, str] = {
    r"sd(xl)?turbo": "turbo",
    r"sdxllightning([248])step": r"lightning-\1",
    r"sdxs512": "sdxs",
}
_UNNAMED = ("pytorch_lora_weights", "adapter_model")  # what diffusers and PEFT call every file: its folder has the name
_TITLES = ("modelspec.title", "ss_output_name")


@dataclass(frozen=True, slots=True)
class Distillation:
    """A preset, and what tells that it is the one."""

    preset: str
    evidence: str


def find_distillation(checkpoint: Checkpoint) -> Distillation | None:
    """Return what a LoRA that is fused was distilled for, or the checkpoint itself; None where neither says so."""
    for lora in checkpoint.loras:
        for name in _names_of_lora(lora):
            if preset := _preset(name, _LORAS):
                return Distillation(preset, f"the LoRA {name}")
    for name in _names_of_checkpoint(checkpoint):
        preset = _preset(name, _CHECKPOINTS)
        if preset and (preset != "turbo" or _is_trailing(checkpoint)):
            return Distillation(preset, f"the name {name}")
    return None


def _is_trailing(checkpoint: Checkpoint) -> bool:
    """Whether its scheduler is as Turbo's authors published it; a single file does not tell."""
    return checkpoint.single_file or checkpoint.config.noise_schedule.timestep_spacing == "trailing"


def _preset(name: str, known: Mapping[str, str]) -> str | None:
    plain = re.sub(r"[\W_]+", "", name.casefold())
    found = ((re.match(sign, plain), preset) for sign, preset in known.items())
    return next((match.expand(preset) for match, preset in found if match), None)


def _names_of_lora(lora: Lora) -> Iterator[str]:
    yield from _titles(read_lora_header(lora.path).metadata)
    yield lora.path.absolute().parent.name if lora.path.stem in _UNNAMED else lora.path.stem


def _names_of_checkpoint(checkpoint: Checkpoint) -> Iterator[str]:
    """The hub id's last part, or the folder's or file's name, and what is written inside."""
    if checkpoint.single_file and checkpoint.path.suffix == ".safetensors":
        yield from _titles(read_header(checkpoint.path)[1])
    yield Path(checkpoint.name).name
    if not checkpoint.single_file and (origin := checkpoint.config.index.name_or_path):
        yield Path(origin).name


def _titles(metadata: Mapping[str, str]) -> Iterator[str]:
    return (printable(metadata[key]) for key in _TITLES if key in metadata)
