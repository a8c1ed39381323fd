"""Graphs in INT8 for OpenVINO: their weights everywhere, and the arithmetic of most convolutions and linear layers.

Those are where a UNet and a decoder spend their time, and normalised activations suit eight bits. What reaches into
the latents themselves, or sums up without a norm in between, keeps floating-point activations, as attention does: in
BF16 where the processor has it. What frames the model, a step's own arithmetic and the timestep's angles, is in FP32.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import Any
from xml.etree import ElementTree

from engines.backends.openvino.device import TAKES_BF16
from engines.backends.openvino.package import openvino
from engines.backends.openvino.upsampling import at_low_resolution
from engines.backends.registry import install_command
from engines.build.parts import Model, change_in_parts
from engines.contract import Array
from engines.errors import EngineError
from engines.files import replacing_all

_LAYERS = ("Convolution", "MatMul")
_NORMS = ("MVN", "GroupNormalization")
_TRANSFORMER = ".transformer_blocks."
_OF_PROMPT = (".attn2.to_k.", ".attn2.to_v.")

# Calibrating takes some twelve bytes for each of so many weights at once.
MAX_WEIGHTS = 250_000_000


def quantize(onnx: Path, out: Path, recording: Sequence[Mapping[str, Array]]) -> tuple[Path, ...]:
    """Write an .xml and a .bin by the name of `onnx` to folder `out`: that FP32 graph with its weights in INT8.

    `recording` holds the graph's inputs by name for each call along some trajectories: the activations there set the
    ranges of eight bits. Dimensions that vary stay so.

    Raises:
        EngineError: NNCF is not installed, the graph cannot be read, or the recording is empty or not of this graph.
    """
    model = at_low_resolution(_read(onnx))
    _check(recording, model)
    robust = [*_robust_convolutions(model), *_robust_linears(model)]
    try:
        with _quiet_nncf() as nncf:
            model = _compressed(nncf, model, keep=robust)
            model = change_in_parts(
                model,
                lambda part, samples: _calibrated(nncf, part, robust, samples, count=len(recording)),
                recording,
                max_weights=MAX_WEIGHTS,
                folder=out,
            )
    except RuntimeError as error:
        raise EngineError(f"{onnx} cannot be calibrated on this recording: {error}") from error
    model.set_rt_info(True, TAKES_BF16)
    return _write(model, out / onnx.stem, exact=_frame(model))


def compress(onnx: Path, out: Path) -> tuple[Path, ...]:
    """Write an .xml and a .bin by the name of `onnx` to folder `out`: that FP32 graph with its weights in INT8.

    Its arithmetic stays in FP32.

    Raises:
        EngineError: NNCF is not installed, or the graph cannot be read.
    """
    model = _read(onnx)
    with _quiet_nncf() as nncf:
        model = _compressed(nncf, model, keep=[])
    return _write(model, out / onnx.stem)


def _read(onnx: Path) -> Model:
    try:
        return openvino.Core().read_model(onnx)
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot read {onnx}: {error}") from error


def _check(recording: Sequence[Mapping[str, Array]], model: Model) -> None:
    if not recording:
        raise EngineError("There is nothing to calibrate INT8 on: record the inputs of at least one image.")
    names = {port.any_name for port in model.inputs}
    for inputs in recording:
        if names != inputs.keys():
            raise EngineError(f"This graph takes {sorted(names)}, the recording has {sorted(inputs)}: record it again.")


def _robust_convolutions(model: Model) -> list[str]:
    """Names of the convolutions that may compute in eight bits, in the order in which they run.

    Not those that read latents before the first norm (a decoder without norms has no others), nor the last, which
    writes them, nor the shortcuts, which read the sum of all that went before them: a twentieth of the work, and half
    of the error.
    """
    nodes = model.get_ordered_ops()
    normed = itertools.dropwhile(lambda node: node.get_type_name() not in _NORMS, nodes)
    convolutions = [node for node in normed if node.get_type_name() == "Convolution"]
    return [
        node.get_friendly_name()
        for node in convolutions[:-1]
        if not _is_shortcut(node) and not _is_read_without_bias(node)
    ]


def _is_read_without_bias(convolution: Any) -> bool:
    """Whether several layers read its output as it is. OpenVINO 2026.4 scales that twice where it is in eight bits."""
    readers = [str(port.get_node().get_type_name()) for port in convolution.output(0).get_target_inputs()]
    return sum(reader != "ShapeOf" for reader in readers) > 1


def _is_shortcut(convolution: Any) -> bool:
    """Whether it only changes the number of channels: weights [out, in, 1, 1]."""
    channels_out, channels_in, *kernel = convolution.input(1).get_shape()
    return set(kernel) == {1} and channels_out != channels_in


def _robust_linears(model: Model) -> list[str]:
    """Names of the linear layers that may compute in eight bits: those of transformer blocks that see the image.

    Not the ones that see the prompt or the timestep, which have few rows, and nothing to win.
    """
    linears = (node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul")
    return [node.get_friendly_name() for node in linears if _sees_image(_weights_of(node))]


def _sees_image(weights: str) -> bool:
    return _TRANSFORMER in weights and not any(layer in weights for layer in _OF_PROMPT)


def _weights_of(node: Any) -> str:
    """The name that the checkpoint gives to the weights of `node`; empty where it has none."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Convert", "Transpose", "Reshape"):  # of weights that are stored otherwise
        source = source.input_value(0).get_node()
    return str(source.get_friendly_name()) if source.get_type_name() == "Constant" else ""


def _compressed(nncf: Any, model: Model, *, keep: list[str]) -> Model:
    """The weights of everything but `keep` in INT8, one scale per output channel; the arithmetic as it was."""
    return nncf.compress_weights(
        model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=nncf.IgnoredScope(names=keep)
    )


def _calibrated(
    nncf: Any, model: Model, robust: list[str], recording: Iterable[Mapping[str, Array]], *, count: int
) -> Model:
    """`robust` in INT8, weights and activations, within the ranges that the `count` calls of `recording` show."""
    names = {node.get_friendly_name() for node in model.get_ops()}
    if names.isdisjoint(robust):  # as parts of a model can be
        return model
    others = names.difference(robust)
    return nncf.quantize(
        model,
        nncf.Dataset(recording, dict),
        subset_size=count,
        preset=nncf.QuantizationPreset.MIXED,  # activations about their own zero point: SiLU's are nearly one-sided
        ignored_scope=nncf.IgnoredScope(names=sorted(others)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Processors without VNNI saturate sums of two products; weights of seven bits leave them room.
            overflow_fix=nncf.OverflowFix.ENABLE,
            # Ranges change along a trajectory, and each step must fit: the largest seen, not the mean.
            activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
            disable_bias_correction=True,  # measured: images come no closer with it
        ),
    )


def _frame(model: Model) -> set[str]:
    """Names of the nodes that no layer with weights comes before, or none comes behind.

    In BF16's eight bits of mantissa timestep 999 is 1000, and a scheduler's table a rough one.
    """
    ordered = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    sources = {
        name: [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        for name, node in ordered.items()
    }
    fixed, layers = set[str](), set[str]()
    for name, node in ordered.items():
        kind = node.get_type_name()
        if kind != "Parameter" and fixed.issuperset(sources[name]):
            fixed.add(name)
        elif kind in _LAYERS and not fixed.isdisjoint(sources[name]):
            layers.add(name)
    behind, ahead = set(layers), set(layers)
    for name in ordered:
        if not behind.isdisjoint(sources[name]):
            behind.add(name)
    for name in reversed(ordered):
        if name in ahead:
            ahead.update(sources[name])
    return ordered.keys() - fixed - (behind & ahead)


def _write(model: Model, path: Path, *, exact: Collection[str] = ()) -> tuple[Path, ...]:
    """Write the graph and its weights. Nodes named `exact` compute in FP32 wherever they run."""
    weights, graph = path.with_suffix(".bin"), path.with_suffix(".xml")
    with replacing_all(weights, graph) as folder:
        try:
            openvino.save_model(model, folder / graph.name, compress_to_fp16=False)
        except RuntimeError as error:  # on a full disk it says "iostream error"
            room = f"{disk_usage(path.parent).free / 1e6:.0f} MB are free there"
            raise EngineError(
                f"OpenVINO cannot write {graph} ({error}); {room}: make room, or choose another --out."
            ) from error
        _mark(folder / graph.name, exact)
    return graph, weights


def _mark(graph: Path, exact: Collection[str]) -> None:
    """OpenVINO's own mark of nodes that take no lower precision, which its Python API can read and not write."""
    tree = ElementTree.parse(graph)  # noqa: S314 - OpenVINO has just written it
    for layer in tree.iter("layer"):
        if layer.get("name") in exact:
            facts = layer.find("rt_info")
            facts = ElementTree.SubElement(layer, "rt_info") if facts is None else facts
            ElementTree.SubElement(facts, "attribute", name="precise", version="0")
    tree.write(graph, encoding="utf-8", xml_declaration=True)


@contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF without its warnings, its log, and the bars it draws on standard output."""
    with warnings.catch_warnings(action="ignore"):
        try:
            import nncf  # noqa: PLC0415 - seconds, and torch where it is installed
            import rich  # noqa: PLC0415 - NNCF brings it, and draws on its shared console
        except ImportError as error:
            raise EngineError(f"INT8 needs the package {error.name}: {install_command('int8')}") from error
        nncf.set_log_level(logging.ERROR)
        console = rich.get_console()
        was, console.quiet = console.quiet, True
        try:
            yield nncf
        finally:
            console.quiet = was
