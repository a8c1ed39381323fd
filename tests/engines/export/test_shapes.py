"""Steps of UNets of every shape are what diffusers' own UNet computes, the shallow ones too; and so are distilled VAEs.

By the graphs' modules in torch. That ONNX graphs compute the same is checked at every export.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from engines.checkpoints.find import find_checkpoint
from engines.contract import LANES, TERMS, GraphName
from engines.export.preview import fit_rgb
from engines.export.trace import Traced, to_onnx, traced_graphs
from engines.export.weights import save_reference
from tests.support.checkpoints import load
from tests.support.loaded import Loaded
from tests.support.tiny import make_checkpoint

SHAPES = ("sd1", "sd15", "no-mid", "bk-tiny", "sdxs", "xl", "ssd-1b", "koala")
ROWS, SIDE = 3, 8
Graphs = Callable[[str], tuple[Path, dict[GraphName, Traced]]]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """The checkpoint and the graphs of a family."""
    root = tmp_path_factory.mktemp("shapes")

    def made(family: str) -> tuple[Path, dict[GraphName, Traced]]:
        folder = make_checkpoint(root / family, family)
        checkpoint = find_checkpoint(str(folder))
        config = checkpoint.config
        return folder, traced_graphs(load(checkpoint), config.latent, config.context)

    return made


def step_of(traced: Traced) -> dict[str, Tensor]:
    """The inputs of a step whose next x is the UNet's output: an image for each row, at its own timestep."""
    inputs = traced.random_inputs(R=ROWS, B=ROWS, L=1, h=SIDE, w=SIDE)
    inputs["row_image"] = torch.arange(ROWS)
    inputs["slot"] = torch.arange(ROWS)
    inputs["guidance"] = torch.eye(ROWS)
    inputs["timestep"] = torch.tensor([1.0, 500.0, 999.0])
    inputs["inpaint"] = torch.zeros_like(inputs["inpaint"])
    inputs["coef"] = torch.zeros(ROWS, LANES, TERMS)
    inputs["coef"][:, 0, 1] = 1  # the model's output
    return inputs


def expected_of(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    rows = inputs["row_context"][:, 0]
    added = (
        {"text_embeds": inputs["text_embeds"][rows], "time_ids": inputs["time_ids"]} if "time_ids" in inputs else None
    )
    x = inputs["state"][inputs["slot"], 0] * inputs["scale"][:, None, None, None]
    with torch.inference_mode():
        made: Tensor = unet(x, inputs["timestep"], inputs["context"][rows], added_cond_kwargs=added).sample
    return made


@pytest.mark.parametrize("family", SHAPES)
def test_steps_are_those_of_diffusers(graphs: Graphs, family: str) -> None:
    """A shallow step with the features of a full one at the same timestep is the full one, but for their rounding."""
    folder, made = graphs(family)
    inputs = step_of(made["denoise"])
    expected = expected_of(folder, inputs)
    assert expected.std() > 0.01, "the output is flat: it proves nothing"
    with torch.inference_mode():
        full, _, features = made["denoise"].module(**inputs)
        shallow, _ = made["denoise_shallow"].module(**inputs, features=features, row_feature=torch.arange(ROWS))
        blind, _ = made["denoise_shallow"].module(**inputs, features=0 * features, row_feature=torch.arange(ROWS))
    torch.testing.assert_close(full[:ROWS, 0], expected, atol=1e-5, rtol=1e-4)
    error = (shallow[:ROWS, 0] - expected).abs().max()
    assert error < 2e-3 * expected.abs().max()
    assert (blind[:ROWS, 0] - expected).abs().max() > 20 * error


def test_a_distilled_vae_encodes_without_chance(graphs: Graphs, tmp_path: Path) -> None:
    folder, made = graphs("sdxs")
    vae: Any = AutoencoderTiny.from_pretrained(folder / "vae").eval()
    traced = made["encode_image"]
    inputs = traced.random_inputs()
    with torch.inference_mode():
        pixels = inputs["images"].float().permute(0, 3, 1, 2) / 127.5 - 1
        expected = vae.encode(pixels).latents * vae.config.scaling_factor
        assert torch.equal(traced.module(**inputs), expected)
    torch.testing.assert_close(run(traced, inputs, tmp_path), expected, atol=1e-3, rtol=1e-3)
    decode: Any = made["decode"].module
    assert decode.vae.config == vae.config
    assert "decode_fast" not in made
    preview = torch.tensor(fit_rgb(vae, traced.latent))
    assert preview.shape == (3, 5)
    assert preview.isfinite().all()


def run(traced: Traced, inputs: dict[str, Tensor], folder: Path) -> Tensor:
    """The latents that ONNX Runtime computes by the exported graph."""
    path = folder / "encode_image.onnx"
    save_reference(to_onnx(traced), path, storage="fp32")
    encode = Loaded("onnxruntime", path, threads=1)
    like = {name: values.astype(np.float32) for name, values in traced.compute(inputs).items()}
    return torch.from_numpy(encode({name: value.numpy() for name, value in inputs.items()}, like)["latents"])
