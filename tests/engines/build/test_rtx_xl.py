"""TensorRT for RTX fuses every attention of Stable Diffusion XL, whose transformers have several depths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.build.trt.parent import build_engine
from engines.checkpoints.checkpoint import Checkpoint
from engines.export.trace import Traced, to_onnx, traced_graphs
from engines.export.weights import save_reference
from engines.progress import NullProgress
from tests.support import tiny
from tests.support.checkpoints import load
from tests.support.tiny import make_checkpoint

WIDE: Mapping[str, Any] = {
    "layers_per_block": 1,  # half the published layers, which take half as long to trace
    "block_out_channels": (64, 128),
    "attention_head_dim": [1, 2],  # heads, despite the name; each 64 wide, as in the published model
    "norm_num_groups": 32,
}


@pytest.fixture
def denoise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Traced:
    """The step of a small Stable Diffusion XL with heads as wide as real ones."""
    family = tiny.FAMILIES["xl"]
    monkeypatch.setattr(tiny, "FAMILIES", {"xl": replace(family, unet={**family.unet, **WIDE})})
    checkpoint = Checkpoint(name="xl", path=make_checkpoint(tmp_path / "xl", "xl"))
    return traced_graphs(load(checkpoint), checkpoint.config.latent, checkpoint.config.context)["denoise"]


def test_every_attention_is_fused(denoise: Traced, tmp_path: Path) -> None:
    path, _ = save_reference(to_onnx(denoise, torch.float16), tmp_path / "denoise.onnx", storage="fp32")
    inputs = denoise.random_inputs(R=2, B=1, h=16, w=16, L=1)
    profile = {name: (tuple(value.shape),) * 3 for name, value in inputs.items()}
    report = build_engine("tensorrt_rtx", path, tmp_path / "denoise.engine", [profile], progress=NullProgress())
    assert report.layers
    assert report.layers["attentions"] == report.layers["fused_attentions"]
    assert report.layers["attentions"] == sum(1 for name, _ in denoise.module.named_modules() if name[-5:-1] == "attn")
    assert (report.layers["group_norms"], report.layers["fused_group_norms"]) == (21, 19)  # two channels in a group
