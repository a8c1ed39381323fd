"""A checkpoint becomes a bundle: four checked ONNX graphs, the tokenizer and the manifest."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.export import Dim
from transformers import CLIPTextModel, CLIPTokenizer

from engines.base import Array, EngineError, TensorSpec
from engines.checkpoint import Checkpoint, CheckpointError
from engines.graphs import VARYING, Decode, Denoise, EncodeImage, EncodePrompt, GraphModule, Port
from engines.host import HostBuffer
from engines.manifest import (
    GRAPHS,
    MANIFEST,
    Defaults,
    File,
    Graph,
    GraphName,
    Latent,
    Manifest,
    Size,
    Tokenizer,
    write_atomically,
)
from engines.onnxruntime import open_device

OPSET = 20  # 23 has a native Attention, around which TensorRT's parser lays transposes
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}  # largest error against torch in FP32, relative to the largest value
_LARGE = 1024  # values of a tensor that is worth halving
_INLINE_LIMIT = 100 * 2**20  # a graph with more weights than this keeps them in a file beside it

Precision = Literal["fp32", "fp16"]


class ExportError(EngineError):
    """A graph could not be exported, or does not compute what torch computes."""


@dataclass(frozen=True)
class _Traced:
    """What a graph is exported and checked with: its module, and inputs of sizes that all differ."""

    module: GraphModule
    sizes: Mapping[str, int]  # of every dimension that has a name
    example: Mapping[str, torch.Tensor]

    def shape(self, port: Port) -> tuple[str | int, ...]:
        """Numbers, and names where the shape varies between calls."""
        return tuple(dim if dim in VARYING else self.sizes.get(str(dim), dim) for dim in port.dims)

    def spec(self, name: str, port: Port) -> TensorSpec:
        return TensorSpec(name, str(port.dtype).removeprefix("torch."), self.shape(port))


def export_bundle(  # noqa: PLR0913 - the build's options, all by keyword
    checkpoint: Checkpoint,
    out: Path,
    *,
    name: str | None = None,
    backend: str = "onnxruntime",
    precision: Precision = "fp32",
    resolutions: Sequence[Size] = (),
    rows: Sequence[int] = (2, 4, 8, 16),
    defaults: Defaults | None = None,
    examples: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _stage: None,
) -> Manifest:
    """Export every graph of `checkpoint` into folder `out`; `progress` hears the name of each stage as it begins.

    Raises:
        EngineError: a size does not fit the model, the weights cannot be read, or a graph differs from torch.
    """
    sizes = tuple(resolutions) or (checkpoint.size,)
    for size in sizes:
        _check_size(size, checkpoint)
    progress("reading the checkpoint")
    traced = _trace(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # a bundle is whole or it is none
    built: dict[GraphName, Graph] = {}
    for graph in GRAPHS:
        progress(f"exporting {graph}")
        path = out / "onnx" / f"{graph}.onnx"
        _export(traced[graph], path, precision=precision, latent=checkpoint.latent)
        progress(f"checking {graph} against torch")
        _verify(traced[graph], path, TOLERANCE[precision])
        built[graph] = _describe(traced[graph], path, out)
    progress("writing the manifest")
    manifest = Manifest(
        name=name or checkpoint.name,
        source=checkpoint.source,
        backend=backend,
        precision=precision,
        resolutions=sizes,
        rows=tuple(sorted(set(rows))),
        latent=checkpoint.latent,
        context=checkpoint.context,
        tokenizer=_export_tokenizer(checkpoint, out),
        noise_schedule=checkpoint.noise_schedule,
        defaults=defaults or Defaults(scheduler=checkpoint.scheduler),
        examples=tuple(examples),
        graphs=built,
        versions={
            package: version(package) for package in ("torch", "diffusers", "transformers", "onnx", "onnxruntime")
        },
    )
    manifest.save(out)
    return manifest


def _check_size(size: Size, checkpoint: Checkpoint) -> None:
    multiple = checkpoint.latent.multiple
    if size.width % multiple or size.height % multiple:
        raise ExportError(f"{size} does not fit {checkpoint.name}: width and height must be multiples of {multiple}.")


def _trace(checkpoint: Checkpoint) -> dict[GraphName, _Traced]:
    """Load the weights, and make up inputs for every graph."""
    text_encoder, unet, vae = _load(checkpoint)
    latent, context = checkpoint.latent, checkpoint.context
    unit = latent.multiple // latent.downscale
    sizes = {
        "S": 6,
        "C": 5,
        "B": 2,
        "R": 3,
        "N": 2,
        "n": 2,
        "h": 2 * unit,
        "w": 3 * unit,
        "H": 2 * latent.multiple,
        "W": 3 * latent.multiple,
        "L": context.tokens,
        "c": latent.channels,
        "T": context.tokens,
        "D": context.width,
        "V": text_encoder.config.vocab_size,
    }
    modules: dict[GraphName, GraphModule] = {
        "encode_prompt": EncodePrompt(text_encoder),
        "denoise": Denoise(unet),
        "decode": Decode(vae),
        "encode_image": EncodeImage(vae),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        name: _Traced(module, sizes, {key: _random(port, sizes, generator) for key, port in module.inputs.items()})
        for name, module in modules.items()
    }


def _size(dim: str | int, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


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


def _load(checkpoint: Checkpoint) -> tuple[Any, Any, Any]:
    options = {"use_safetensors": True, "local_files_only": True, "torch_dtype": torch.float32}
    try:
        with _quiet():
            text_encoder = CLIPTextModel.from_pretrained(
                checkpoint.folder / "text_encoder",
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
            unet = UNet2DConditionModel.from_pretrained(checkpoint.folder / "unet", **options)
            vae = AutoencoderKL.from_pretrained(checkpoint.folder / "vae", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The weights of {checkpoint.name} cannot be loaded: {error}") from error
    return text_encoder.eval(), unet.eval(), vae.eval()


def _export(traced: _Traced, path: Path, *, precision: Precision, latent: Latent) -> None:
    """Trace the module with its varying dimensions, and write the ONNX graph. Weights past a limit lie beside it."""
    dims = _dims(latent)
    shapes = {
        name: {axis: dims[dim] for axis, dim in enumerate(traced.shape(port)) if isinstance(dim, str)}
        for name, port in traced.module.inputs.items()
    }
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            traced.module,
            kwargs=dict(traced.example),
            dynamic_shapes=shapes,
            output_names=[traced.module.output[0]],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{path.stem} was not exported: the exporter returned nothing.")
    model = program.model
    _tidy(model.graph, traced)
    _name_weights(model.graph, traced.module)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    if precision == "fp16":
        _store_as_fp16(model.graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = path.with_suffix(".onnx.data")
    weights.unlink(missing_ok=True)
    apart = (
        sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        > _INLINE_LIMIT
    )
    ir.save(model, path, external_data=weights.name if apart else None)
    onnx.checker.check_model(path)


def _dims(latent: Latent) -> dict[str, Any]:
    """The dimensions that vary. Latent sides are multiples of what the UNet halves, picture sides of that in pixels."""
    dims: dict[str, Any] = {name: Dim(name, min=1, max=65536) for name in VARYING - set("hwHW")}
    side = latent.multiple // latent.downscale
    for name in ("h", "w"):
        unit = Dim(f"{name}_unit", min=1, max=1024)
        dims[name] = side * unit
        dims[name.upper()] = latent.multiple * unit
    return dims


def _tidy(graph: ir.Graph, traced: _Traced) -> None:
    """Give inputs and output the manifest's dimension names, and drop what the exporter notes on its own way.

    A stack trace per node holds more bytes than a small model, and paths of the machine that built it.
    """
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    for value in graph.inputs:
        value.shape = ir.Shape(traced.shape(traced.module.inputs[str(value.name)]))
    graph.outputs[0].shape = ir.Shape(traced.shape(traced.module.output[1]))


def _name_weights(graph: ir.Graph, module: GraphModule) -> None:
    """Give back their names to weights that the exporter folded into constants: reshaped, or transposed (`.T`).

    So people can read the graph, and the checkpoint can be restored from it.
    """
    names: dict[bytes, str] = {}
    for name, weight in module.named_parameters():
        array = weight.detach().numpy()
        names.setdefault(_digest(array), name)
        if array.ndim == 2:
            names.setdefault(_digest(array.T), f"{name}.T")
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        known = names.get(_digest(value.const_value.numpy()))
        if known and known not in graph.initializers:
            value.name = known


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def _store_as_fp16(graph: ir.Graph) -> None:
    """Halve the file: weights are stored as FP16 and cast to FP32, once, when a backend folds constants at load.

    A weight is a large matrix or kernel. Vectors stay: they are small, and the timestep frequencies among them would
    lose digits that matter. So does what FP16 cannot hold, such as a causal mask.
    """
    casts = []
    for name, weight in list(graph.initializers.items()):
        stored = _half(weight, name=f"{name}.fp16")
        if stored is None:
            continue
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        weight.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.initializers.add(stored)
        casts.append(cast)
    graph.insert_before(graph[0], casts)


def _half(weight: ir.Value, *, name: str) -> ir.Value | None:
    """The weight in FP16, or None for what is better kept as it is."""
    tensor = weight.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or tensor.size < _LARGE:
        return None
    with np.errstate(over="ignore"):
        array = tensor.numpy().astype(np.float16)
    if not np.isfinite(array).all():
        return None
    stored = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(stored.dtype), const_value=stored)


def _describe(traced: _Traced, path: Path, root: Path) -> Graph:
    weights = path.with_suffix(".onnx.data")
    return Graph(
        files=tuple(File.of(file, root=root) for file in (path, weights) if file.exists()),
        inputs=tuple(traced.spec(*named) for named in traced.module.inputs.items()),
        outputs=(traced.spec(*traced.module.output),),
    )


def _export_tokenizer(checkpoint: Checkpoint, out: Path) -> Tokenizer:
    """Whatever form the checkpoint keeps it in, the bundle holds one `tokenizer.json`."""
    try:
        with _quiet():
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The tokenizer of {checkpoint.name} cannot be loaded: {error}") from error
    path = out / "tokenizer.json"
    write_atomically(path, tokenizer.backend_tokenizer.to_str().encode())
    return Tokenizer(file=File.of(path, root=out), pad=tokenizer.pad_token_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks on their own internals from people who build an engine."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers.logging.disable_progress_bar()  # the build shows its own
        try:
            yield
        finally:
            transformers.logging.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _verify(traced: _Traced, path: Path, tolerance: float) -> None:
    """Run the written graph in ONNX Runtime and raise ExportError where it strays from torch."""
    with torch.inference_mode():
        expected = traced.module(**traced.example).numpy()
    device = open_device(threads=0)
    output = device.allocate(expected.shape, expected.dtype)
    inputs = {name: HostBuffer(value.contiguous().numpy()) for name, value in traced.example.items()}
    device.load(path).bind({**inputs, traced.module.output[0]: output}).run()
    error = _relative_error(output.read(), expected)
    if not error <= tolerance:  # NaN fails too
        raise ExportError(f"{path.name} differs from torch by {error:.1e} of its range, more than {tolerance:.0e}.")


def _relative_error(actual: Array, expected: Array) -> float:
    wide = expected.astype(np.float64)
    return float(np.abs(actual.astype(np.float64) - wide).max() / max(np.abs(wide).max(), 1e-6))
