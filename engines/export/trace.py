"""From a graph's torch module to a readable ONNX model, with the names and shapes of the contract."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from engines.checkpoints.loading.libraries import quiet
from engines.checkpoints.loading.mapped import LARGE_WEIGHT
from engines.checkpoints.loading.modules import Modules
from engines.contract import VARYING, Array, GraphName, Port, TensorSpec, build_inputs, random_values
from engines.errors import EngineError
from engines.export.graph_module import GraphModule
from engines.export.lora import updated_layers
from engines.export.modules import (
    Decode,
    DecodeFast,
    Denoise,
    EncodeImage,
    LoraDenoise,
    LoraShallowDenoise,
    ShallowDenoise,
)
from engines.export.prompts import EncodePrompt, EncodePromptPair, LoraEncodePrompt, LoraEncodePromptPair
from engines.export.safety import Safety
from engines.export.stand_ins import StandIns
from engines.lora.layout import lay_out, width_of
from engines.manifest import ComputeDtype, Context, Latent, LoraLayer

OPSET = 20  # 23 has a native Attention, around which TensorRT's parser lays transposes
_FEW = 63  # rows and images: diffusers upsamples more by a branch of its own, of which torch would ask after one trace
_MASK = 1e30  # values beyond it, -inf among them, hide a score from softmax, in FP16 as well
DTYPES: Mapping[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ExportError(EngineError):
    """A graph could not be exported, or does not compute what torch computes."""


@dataclass(frozen=True)
class Traced:
    """A graph to export and check: its module, and the size of each named dimension to do it at."""

    module: GraphModule
    sizes: Mapping[str, int]
    latent: Latent

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(port.spec(self.sizes) for port in self.module.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(port.spec(self.sizes) for port in self.module.outputs)

    def compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """The outputs that torch computes, by name."""
        with torch.inference_mode():
            made = self.module(**inputs)
        values = made if isinstance(made, tuple) else (made,)
        return {port.name: value.numpy() for port, value in zip(self.module.outputs, values, strict=True)}

    def random_inputs(self, **sizes: int) -> dict[str, torch.Tensor]:
        """Values within the ports' bounds; `sizes` replace those of the dimensions, which all differ."""
        make = random_values(np.random.default_rng(0))
        arrays = build_inputs(self.module.inputs, {**self.sizes, **sizes}, make=make)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def lora_layers(modules: Modules) -> tuple[LoraLayer, ...]:
    """The layers of `modules` that LoRAs update, and where their factors lie."""
    return lay_out([layer for part, module in modules.lora_parts.items() for layer in updated_layers(part, module)])


def traced_graphs(
    modules: Modules, latent: Latent, context: Context, layers: Sequence[LoraLayer] = ()
) -> dict[GraphName, Traced]:
    """Every graph of `modules`, with small sizes to trace and check it at; with `layers` also those for LoRAs."""
    unit = latent.multiple // latent.downscale
    denoise = Denoise(modules.unet)
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
        **_text_sizes(modules),
    }
    graphs: dict[GraphName, GraphModule] = {
        "encode_prompt": _encode_prompt(modules),
        "denoise": denoise,
        "denoise_shallow": ShallowDenoise(modules.unet),
        "decode": Decode(modules.vae),
        "encode_image": EncodeImage(modules.vae, masks=denoise.inpaints),
    }
    if modules.decoder:
        graphs["decode_fast"] = DecodeFast(modules.decoder)
    if checker := modules.safety_checker:
        safety = graphs["safety"] = Safety(checker.module, checker.preprocessing)
        sizes |= {"k": safety.concepts, "j": safety.special_care}
    if layers:
        graphs["encode_prompt_lora"] = _encode_prompt(modules, layers)
        graphs["denoise_lora"] = LoraDenoise(modules.unet, layers)
        graphs["denoise_shallow_lora"] = LoraShallowDenoise(modules.unet, layers)
        sizes |= {"Q": 9, "A": 4, "G": width_of(layers)}
    return {name: Traced(module.eval(), sizes, latent) for name, module in graphs.items()}


def _text_sizes(modules: Modules) -> dict[str, int]:
    """Sizes of the dimensions that belong to prompts."""
    encoders = [modules.text_encoder, *([modules.text_encoder_2] if modules.text_encoder_2 else [])]
    words = [encoder.get_input_embeddings().num_embeddings for encoder in encoders]
    sizes = {"V": words[0], "E": min(encoder.config.num_hidden_layers for encoder in encoders) + 1}
    if modules.text_encoder_2:
        sizes |= {"U": words[1], "Z": modules.text_encoder_2.config.projection_dim}
    return sizes


def _encode_prompt(modules: Modules, layers: Sequence[LoraLayer] = ()) -> GraphModule:
    """The graph that encodes prompts; with `layers` the variant for LoRAs."""
    if modules.text_encoder_2:
        pair = LoraEncodePromptPair if layers else EncodePromptPair
        return pair(modules.text_encoder, modules.text_encoder_2, layers)
    return (LoraEncodePrompt if layers else EncodePrompt)(modules.text_encoder, layers)


def to_onnx(traced: Traced, dtype: torch.dtype = torch.float32) -> ir.Model:
    """Trace the module with its weights in `dtype`; large ones are read from it when the model is written.

    Raises:
        ExportError: torch exports nothing.
    """
    shapes = dynamic_shapes(traced.module.inputs, traced.latent)
    stand_ins = StandIns(traced.module, dtype)
    with quiet(), torch.inference_mode():
        program = torch.onnx.export(
            stand_ins.module,
            kwargs=traced.random_inputs(),
            dynamic_shapes=shapes,
            output_names=[port.name for port in traced.module.outputs],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{type(traced.module).__name__} was not exported: the exporter returned nothing.")
    model: ir.Model = program.model
    _tidy(model, traced)
    large = stand_ins.replace(model.graph)
    _name_weights(model.graph, stand_ins.module, known=large)
    return model


def largest_value(traced: Traced, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude that any operation inside the module writes, attention scores included.

    Infinite where one writes NaN.
    """
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
            largest = float(torch.where(sizes >= _MASK, 0, sizes).amax())
            self.largest = max(self.largest, math.inf if math.isnan(largest) else largest)  # max() passes NaN over
        return result


def dynamic_shapes(ports: Iterable[Port], latent: Latent) -> dict[str, dict[int, Any]]:
    """torch's dimension of each axis that varies between calls, by input and axis."""
    dims = _dims(latent)
    return {port.name: {axis: dims[dim] for axis, dim in enumerate(port.dims) if dim in VARYING} for port in ports}


def _dims(latent: Latent) -> dict[int | str, Any]:
    """The dimensions that vary. Latent sides are multiples of the UNet's downsampling, image sides too, in pixels."""
    most = {"R": _FEW, "n": _FEW}
    dims: dict[int | str, Any] = {name: Dim(name, min=1, max=most.get(name, 65536)) for name in VARYING - set("hwHW")}
    side = latent.multiple // latent.downscale
    for name in ("h", "w"):
        unit = Dim(f"{name}_unit", min=1, max=1024)
        dims[name] = side * unit
        dims[name.upper()] = latent.multiple * unit
    return dims


def _tidy(model: ir.Model, traced: Traced) -> None:
    """Name the dimensions of inputs and outputs as the contract does, and drop the exporter's metadata.

    Its stack traces hold more bytes than a small model, and paths of the machine that built it.
    """
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    specs = {spec.name: spec for spec in (*traced.inputs, *traced.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(specs[str(value.name)].shape)
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _name_weights(graph: ir.Graph, module: GraphModule, *, known: Collection[str]) -> None:
    """Restore the names of weights that the exporter folded into constants: reshaped, or transposed (`.T`).

    The graph stays readable, graphs of several precisions can share weights, and the checkpoint can be restored.
    Those in `known` have theirs.
    """
    names: dict[bytes, str] = {}
    for name, weight in module.named_parameters():
        if weight.numel() >= LARGE_WEIGHT:
            continue
        array = ir.tensor(weight.detach()).numpy()
        names.setdefault(_digest(array), name)
        if array.ndim == 2:
            names.setdefault(_digest(array.T), f"{name}.T")
    for value in list(graph.initializers.values()):
        if value.name in known or value.const_value is None or not value.const_value.dtype.is_floating_point():
            continue
        found = names.get(_digest(value.const_value.numpy()))
        if found and found not in graph.initializers:
            value.name = found


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
