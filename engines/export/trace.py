"""From a graph's torch module to an ONNX model that people can read: names and shapes as the manifest has them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from engines.checkpoints.load import Modules, quiet
from engines.contract import Array, GraphName, TensorSpec
from engines.errors import EngineError
from engines.export.modules import (
    VARYING,
    Decode,
    Denoise,
    EncodeImage,
    EncodePrompt,
    GraphModule,
    GuidedDenoise,
    GuidedShallowDenoise,
    Port,
    ShallowDenoise,
)
from engines.manifest import ComputeDtype, Context, Latent

OPSET = 20  # 23 has a native Attention, around which TensorRT's parser lays transposes
_MASK = 1e30  # values beyond it, -inf among them, hide a score from softmax, in FP16 as well
DTYPES: Mapping[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ExportError(EngineError):
    """A graph could not be exported, or does not compute what torch computes."""


@dataclass(frozen=True)
class Traced:
    """What a graph is exported and checked with: its module, and the size of each dimension that has a name."""

    module: GraphModule
    sizes: Mapping[str, int]
    latent: Latent

    def shape(self, port: Port) -> tuple[str | int, ...]:
        """Numbers, and names where the shape varies between calls."""
        return tuple(dim if dim in VARYING else self.sizes.get(str(dim), dim) for dim in port.dims)

    def spec(self, name: str, port: Port) -> TensorSpec:
        return TensorSpec(name, str(port.dtype).removeprefix("torch."), self.shape(port))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.spec(*named) for named in self.module.inputs.items())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.spec(*named) for named in self.module.outputs.items())

    def rounded(self, dtype: torch.dtype) -> Traced:
        """The same graph with its weights in `dtype`; this one keeps its own."""
        return replace(self, module=deepcopy(self.module).to(dtype))

    def compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """What torch makes of `inputs`, by the outputs' names."""
        with torch.inference_mode():
            made = self.module(**inputs)
        values = made if isinstance(made, tuple) else (made,)
        return {name: value.numpy() for name, value in zip(self.module.outputs, values, strict=True)}

    def random_inputs(self, **sizes: int) -> dict[str, torch.Tensor]:
        """Values the graph may be given; `sizes` of dimensions in place of its own, which all differ."""
        generator = torch.Generator().manual_seed(0)
        wanted = {**self.sizes, **sizes}
        return {name: _random(port, wanted, generator) for name, port in self.module.inputs.items()}


def traced_graphs(modules: Modules, latent: Latent, context: Context) -> dict[GraphName, Traced]:
    """Every graph over `modules`, with small sizes to trace and check it at."""
    unit = latent.multiple // latent.downscale
    denoise, shallow = _steps(modules.unet)
    sizes = {
        "S": 6,
        "C": 5,
        "B": 2,
        "R": 3,
        "P": 7,
        "N": 2,
        "n": 2,
        "h": 2 * unit,
        "w": 3 * unit,
        "H": 2 * latent.multiple,
        "W": 3 * latent.multiple,
        "L": 2,
        "c": latent.channels,
        "f": denoise.feature_channels,
        "T": context.tokens,
        "D": context.width,
        "V": modules.text_encoder.get_input_embeddings().num_embeddings,
        "E": modules.text_encoder.config.num_hidden_layers + 1,
    }
    graphs: dict[GraphName, GraphModule] = {
        "encode_prompt": EncodePrompt(modules.text_encoder),
        "denoise": denoise,
        "denoise_shallow": shallow,
        "decode": Decode(modules.decoder),
        "encode_image": EncodeImage(modules.vae),
    }
    return {name: Traced(module.eval(), sizes, latent) for name, module in graphs.items()}


def _steps(unet: Any) -> tuple[Denoise, ShallowDenoise]:
    if unet.config.time_cond_proj_dim is None:
        return Denoise(unet), ShallowDenoise(unet)
    return GuidedDenoise(unet), GuidedShallowDenoise(unet)


def to_onnx(traced: Traced) -> ir.Model:
    """Trace the module as it is, in its own dtype. Raises ExportError."""
    dims = _dims(traced.latent)
    shapes = {
        name: {axis: dims[dim] for axis, dim in enumerate(traced.shape(port)) if isinstance(dim, str)}
        for name, port in traced.module.inputs.items()
    }
    with quiet(), torch.inference_mode():
        program = torch.onnx.export(
            traced.module,
            kwargs=traced.random_inputs(),
            dynamic_shapes=shapes,
            output_names=list(traced.module.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{type(traced.module).__name__} was not exported: the exporter returned nothing.")
    model: ir.Model = program.model
    _tidy(model, traced)
    _name_weights(model.graph, traced.module)
    return model


def largest_value(traced: Traced, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude that any operation inside the module writes, attention scores included."""
    seen = _Magnitudes()
    with (
        torch.inference_mode(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),  # the one that forms the scores
        seen,
    ):
        traced.module(**inputs)
    return seen.largest


class _Magnitudes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Watches every floating-point result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.largest = 0.0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.numel():
            sizes = result.abs()
            self.largest = max(self.largest, float(torch.where(sizes < _MASK, sizes, 0).amax()))
        return result


def _random(port: Port, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    """Values that the port may be given. Indices do not repeat where there are enough: nobody steps twice at once."""
    shape = [_size(dim, sizes) for dim in port.dims]
    if port.below is None:
        return torch.randn(shape, generator=generator, dtype=port.dtype)
    below = _size(port.below, sizes)
    if port.dtype.is_floating_point:
        return below * torch.rand(shape, generator=generator, dtype=port.dtype)
    if math.prod(shape) <= below:
        return torch.randperm(below, generator=generator)[: math.prod(shape)].reshape(shape).to(port.dtype)
    return torch.randint(below, shape, generator=generator, dtype=port.dtype)


def _size(dim: str | int, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


def _dims(latent: Latent) -> dict[str, Any]:
    """The dimensions that vary. Latent sides are multiples of what the UNet halves, picture sides of that in pixels."""
    dims: dict[str, Any] = {name: Dim(name, min=1, max=65536) for name in VARYING - set("hwHW")}
    side = latent.multiple // latent.downscale
    for name in ("h", "w"):
        unit = Dim(f"{name}_unit", min=1, max=1024)
        dims[name] = side * unit
        dims[name.upper()] = latent.multiple * unit
    return dims


def _tidy(model: ir.Model, traced: Traced) -> None:
    """Give inputs and outputs the manifest's dimension names, and drop what the exporter notes on its own way.

    A stack trace per node holds more bytes than a small model, and paths of the machine that built it.
    """
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    for value in graph.inputs:
        value.shape = ir.Shape(traced.shape(traced.module.inputs[str(value.name)]))
    for value in graph.outputs:
        value.shape = ir.Shape(traced.shape(traced.module.outputs[str(value.name)]))
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _name_weights(graph: ir.Graph, module: GraphModule) -> None:
    """Give back their names to weights that the exporter folded into constants: reshaped, or transposed (`.T`).

    So people can read the graph, graphs of several precisions can share their weights, and the checkpoint can be
    restored from it.
    """
    names: dict[bytes, str] = {}
    for name, weight in module.named_parameters():
        array = ir.tensor(weight.detach()).numpy()
        names.setdefault(_digest(array), name)
        if array.ndim == 2:
            names.setdefault(_digest(array.T), f"{name}.T")
    for value in list(graph.initializers.values()):
        if value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        known = names.get(_digest(value.const_value.numpy()))
        if known and known not in graph.initializers:
            value.name = known


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
