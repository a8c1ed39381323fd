"""What the UNet of a single file predicts, where the file or the YAML beside it says so. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.safetensors_header import read_header

_PREDICTIONS: Mapping[str, Literal["epsilon", "v_prediction"]] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "eps": "epsilon",
    "epsilon": "epsilon",
}
_MOST_YAML = 2**20  # bytes


@dataclass(frozen=True)
class Prediction:
    """What the file itself, or the YAML beside it, says of the UNet's output, and where."""

    kind: Literal["epsilon", "v_prediction"]
    source: str
    zero_terminal_snr: bool = False


def read_prediction(path: Path) -> Prediction | None:
    """Return what the UNet of a single file predicts, where that is written down; None where it is not."""
    if path.suffix.lower() == ".safetensors":
        shapes, metadata = read_header(path)
        if "v_pred" in shapes:  # a mark that NoobAI's and ComfyUI's files have
            return Prediction("v_prediction", f"{path.name} (its tensor v_pred)", "ztsnr" in shapes)
        if written := _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower()):
            return Prediction(written, f"{path.name} (its metadata)")
    return _in_yaml(path.with_suffix(".yaml"))


def _in_yaml(path: Path) -> Prediction | None:
    """The `parameterization` of the config that AUTOMATIC1111 expects beside a file."""
    if not path.is_file() or path.stat().st_size > _MOST_YAML:
        return None
    found = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", path.read_text("utf-8", errors="replace"), re.MULTILINE)
    written = _PREDICTIONS.get(found[1].lower()) if found else None
    return Prediction(written, path.name) if written else None
