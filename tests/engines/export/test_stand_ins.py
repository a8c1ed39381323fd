"""Large weights stay in the checkpoint's file: they take no memory, and the graphs are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.backends.host import HostBuffer
from engines.backends.onnxruntime import open_device
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.loading import mapped
from engines.checkpoints.loading.mapped import LARGE_WEIGHT
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.contract import GraphName
from engines.export.trace import Traced, to_onnx, traced_graphs
from engines.export.weights import save_reference
from tests.support.tiny import make_checkpoint

GRAPH: GraphName = "denoise_shallow"  # the fastest to trace that has large weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint in FP16 whose UNet has weights large enough."""
    folder = make_checkpoint(tmp_path_factory.mktemp("wide"), "wide")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    return Checkpoint(name="wide", path=folder)


def load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, *, maps: bool) -> Modules:
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "LARGE_PART", 1 if maps else 2**40)
        return load_modules(checkpoint.config, checkpoint)


def traced(modules: Modules, checkpoint: Checkpoint) -> Traced:
    return traced_graphs(modules, checkpoint.config.latent, checkpoint.config.context)[GRAPH]


def test_a_mapped_module_computes_what_one_in_fp32_does(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, wide = (traced(load(checkpoint, monkeypatch, maps=maps), checkpoint) for maps in (True, False))
    large = [weight for weight in stored.module.parameters() if weight.numel() >= LARGE_WEIGHT]
    assert large
    assert {weight.dtype for weight in large} == {torch.float16}
    inputs = stored.random_inputs()
    mine, theirs = stored.compute(inputs), wide.compute(inputs)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def written(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, tuple[Traced, Path]]:
    """The graph that was traced from mapped weights, and from those in FP32, and its file."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for maps in (True, False):
            graph = traced(load(checkpoint, patch, maps=maps), checkpoint)
            path, _ = save_reference(to_onnx(graph), tmp_path_factory.mktemp("graph") / "g.onnx", storage="fp16")
            made[maps] = graph, path
    return made


def test_its_graph_and_weights_are_the_same_to_the_byte(written: Mapping[bool, tuple[Traced, Path]]) -> None:
    for name in ("g.onnx", "g.weights"):
        mine, theirs = (written[maps][1].with_name(name).read_bytes() for maps in (True, False))
        assert mine == theirs, name


def test_a_graph_holds_the_weights_of_its_module(written: Mapping[bool, tuple[Traced, Path]]) -> None:
    graph, path = written[True]
    parameters = {name: weight.detach().numpy() for name, weight in graph.module.named_parameters()}
    found = 0
    for name, value in ir.load(path).graph.initializers.items():
        parameter = parameters.get(name.removesuffix(".T"))
        if parameter is not None and parameter.size >= LARGE_WEIGHT:
            assert value.const_value is not None
            expected = parameter.T if name.endswith(".T") else parameter
            assert np.array_equal(value.const_value.numpy(), expected), name
            found += 1
    assert found > 2


@pytest.mark.parametrize("is_frugal", [True, False])
def test_a_frugal_device_computes_the_same(written: Mapping[bool, tuple[Traced, Path]], is_frugal: bool) -> None:
    graph, path = written[True]
    inputs = graph.random_inputs()
    device, expected = open_device(threads=1, is_frugal=is_frugal), graph.compute(inputs)
    outputs = {name: device.allocate(value.shape, value.dtype) for name, value in expected.items()}
    bound = {name: HostBuffer(value.contiguous().numpy()) for name, value in inputs.items()}
    device.load(path, device.stream("test")).bind({**bound, **outputs}).launch()
    for name, value in expected.items():
        assert np.abs(outputs[name].array - value).max() <= 1e-4 * np.abs(value).max()
