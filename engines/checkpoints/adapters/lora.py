"""LoRA files: how they are given on the command line, and which of them can be fused. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.errors import CheckpointError
from engines.lora.file import read_lora_header
from engines.lora.refusals import check_is_lora, check_kind
from engines.lora.scaling import ADAPTER_CONFIG

_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT, of diffusers
_FORMS = "write FILE.safetensors or FILE.safetensors:SCALE"


@dataclass(frozen=True)
class Lora:
    """A low-rank update of the weights, and the scale at which it is fused."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:SCALE, such as `style.safetensors:0.8`, or the same of a folder. Raises CheckpointError."""
        path, scale = _split(text)
        return cls(path, _number(scale, path) if scale is not None else 1.0)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the update."""
        config = self.path.with_name(ADAPTER_CONFIG)
        decides = self.path.is_file() and read_lora_header(self.path).config is not None
        return (self.path, config) if decides else (self.path,)


def _split(text: str) -> tuple[Path, str | None]:
    """The file, and the scale as it is written."""
    if Path(text).is_dir():
        return _file_in(Path(text)), None
    before, colon, scale = text.rpartition(":")
    if colon and Path(before).is_dir():
        return _file_in(Path(before)), scale
    if found := re.fullmatch(r"(.+?\.safetensors)(?::(.*))?", text, re.IGNORECASE | re.DOTALL):
        return Path(found[1]), found[2]
    raise CheckpointError(f"{text!r} is not a LoRA file: {_hint(text)}.")


def _hint(text: str) -> str:
    if re.search(r"\.(bin|pt|pth|ckpt)(:|$)", text, re.IGNORECASE):
        return (
            "it is a pickle, and loading one can run code. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), FILE.safetensors), and "
            f"{_FORMS}"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\d.]*)?", text):
        return f"there is no such folder. Download it if it is a hub id, and {_FORMS}"
    return _FORMS


def _file_in(folder: Path) -> Path:
    """The file that PEFT or diffusers has written to a folder, or the only one there."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        held = f"holds {len(found)} .safetensors files" if found else f"holds no {' or '.join(_FOLDER_FILES)}"
        parts = [
            part for part in ("unet", "text_encoder", "text_encoder_2") if (folder / part / _FOLDER_FILES[0]).is_file()
        ]
        remedy = " and ".join(f"--lora {folder / part}" for part in parts) or f"{_FORMS} of one"
        raise CheckpointError(f"{folder} {held}: {f'pass {remedy}' if parts else remedy}.")
    return found[0]


def _number(text: str, path: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CheckpointError(f"{text!r} is not a LoRA scale: write a number, such as {path}:0.8.")
    return number


def check_lora(path: Path) -> None:
    """Raise CheckpointError unless the tensor names are those of a LoRA. Shapes are checked when it is fused."""
    check_is_lora(read_lora_header(path))


def check_lora_fits(lora: Lora, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a LoRA of a model with other text encoders, as far as its header shows."""
    header = read_lora_header(lora.path)
    check_kind(header, model=config.name, width=config.context.width, has_two_encoders=config.has_two_encoders)


def embeddings_in(loras: Sequence[Lora]) -> tuple[Embedding, ...]:
    """The tokens that were trained together with some of `loras`, and lie in the same file."""
    return tuple(Embedding(lora.path) for lora in loras if read_lora_header(lora.path).learned)
