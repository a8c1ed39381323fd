"""Graphs of UNets that take a mask and the masked image: the UNet's input, hidden pixels, LoRAs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.contract import GraphName
from engines.export.modules import Denoise
from engines.export.trace import Traced, lora_layers, traced_graphs
from tests.support.checkpoints import load
from tests.support.fused import fused

Inputs = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def modules(inpainting_checkpoint: Path) -> Modules:
    return load(find_checkpoint(str(inpainting_checkpoint)))


@pytest.fixture(scope="module")
def graphs(inpainting_checkpoint: Path, modules: Modules) -> dict[GraphName, Traced]:
    config = find_checkpoint(str(inpainting_checkpoint)).config
    return traced_graphs(modules, config.latent, config.context, lora_layers(modules))


def of_rows(graph: Traced) -> Inputs:
    """Random inputs, of which x becomes the model's output in each row."""
    inputs = graph.random_inputs(B=3, R=3, L=1)
    inputs["inpaint"][:, 2] = 0  # as the server leaves it
    inputs["row_image"] = torch.arange(3)
    inputs["guidance"] = torch.eye(3)
    inputs["coef"] = torch.zeros_like(inputs["coef"])
    inputs["coef"][:, 0, 1] = 1
    return inputs


def test_the_unet_sees_the_latents_the_mask_and_the_masked_image(
    graphs: dict[GraphName, Traced], modules: Modules
) -> None:
    inputs = of_rows(graphs["denoise"])
    made = graphs["denoise"].compute(inputs)["state_next"][inputs["slot"], 0]
    scaled = inputs["state"][inputs["slot"], 0] * inputs["scale"][:, None, None, None]
    masked, mask = inputs["inpaint"][inputs["slot"], 0], inputs["inpaint"][inputs["slot"], 1, :1]
    with torch.inference_mode():
        text = inputs["context"][inputs["row_context"][:, 0]]
        wanted = modules.unet(torch.cat([scaled, mask, masked], dim=1), inputs["timestep"], text).sample
    np.testing.assert_allclose(made, wanted, atol=1e-5)


@pytest.mark.parametrize("lane", [0, 1])
def test_both_change_the_step(graphs: dict[GraphName, Traced], lane: int) -> None:
    inputs = of_rows(graphs["denoise_shallow"])
    before = graphs["denoise_shallow"].compute(inputs)["state_next"][:, 0]
    inputs["inpaint"][:, lane] += 1
    after = graphs["denoise_shallow"].compute(inputs)["state_next"][:, 0]
    assert np.abs(after - before).max() > 0.01


def test_masked_pixels_are_grey_to_the_vae(graphs: dict[GraphName, Traced], modules: Modules) -> None:
    """As diffusers multiplies the image, in -1..1, by the inverted mask."""
    inputs = graphs["encode_image"].random_inputs()
    made = graphs["encode_image"].compute(inputs)["latents"]
    pixels = (inputs["images"] / 127.5 - 1) * (inputs["mask"] < 0.5)[..., None]
    with torch.inference_mode():
        posterior = modules.vae.encode(pixels.permute(0, 3, 1, 2)).latent_dist
    wanted = (posterior.mean + posterior.std * inputs["noise"]) * modules.vae.config.scaling_factor
    np.testing.assert_allclose(made, wanted, atol=1e-6)


def test_loras_update_it_as_in_its_weights(graphs: dict[GraphName, Traced], modules: Modules) -> None:
    inputs = of_rows(graphs["denoise_lora"])
    inputs["row_lora"][:], inputs["lora_weight"][:] = inputs["row_lora"][0].clone(), inputs["lora_weight"][0].clone()
    made = graphs["denoise_lora"].compute(inputs)["state_next"]
    layers = [layer for layer in lora_layers(modules) if layer.part == "unet"]
    ranks = inputs["lora_pool"][inputs["row_lora"][0]].numpy()
    module = Denoise(fused(modules.unet, layers, ranks, inputs["lora_weight"][0].numpy())).eval()
    plain = {port.name: inputs[port.name] for port in module.inputs}
    with torch.inference_mode():
        wanted, apart = module(**plain)[0], Denoise(modules.unet).eval()(**plain)[0]
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-3)
    assert (wanted - apart).abs().max() > 0.05, "the LoRA changes nothing"
