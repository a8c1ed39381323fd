"""Runs NVIDIA's ModelOpt over a graph, quietly, on this machine's processor."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from engines.backends.registry import install_command
from engines.contract import Array
from engines.errors import EngineError

PACKAGE = "nvidia-modelopt"
EightBits = Literal["fp8", "int8"]
EIGHT_BITS: tuple[EightBits, ...] = ("fp8", "int8")


def modelopt_version() -> str:
    """The version of ModelOpt. Raises EngineError if it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise EngineError(
            f"FP8 and INT8 for TensorRT need the package {PACKAGE}: {install_command('quantize')}"
        ) from error


def quantize(
    graph: Path, out: Path, *, reference: Path, precision: EightBits, recording: Sequence[Mapping[str, Array]]
) -> tuple[Path, ...]:
    """Write the FP16 `graph` to `out` with the ranges of eight bits around its layers, next to its weights.

    Its weights stay where they are and as they are: the compiler of the engine rounds them, to eight bits each.

    Args:
        graph: the graph in FP16.
        out: the file to write, in the folder of `reference`.
        reference: the graph in FP32, whose weights both read.
        precision: the type of the eight bits.
        recording: the graph's inputs by name for each call along some trajectories, which set the ranges.

    Returns:
        The paths of the graph and of its weights.

    Raises:
        EngineError: ModelOpt is not installed, or the graph has no layer to quantize.
    """
    with _quiet_modelopt() as run, TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as folder:
        import onnx_ir as ir  # noqa: PLC0415 - comes with ModelOpt

        from engines.build.qdq.layers import quantizable, save_alone  # noqa: PLC0415 - as above
        from engines.export.weights import save_typed  # noqa: PLC0415 - imports onnx, which comes with ModelOpt

        model = ir.load(graph)
        alone, made = Path(folder) / graph.name, Path(folder) / out.name
        save_alone(model, alone)
        names = quantizable(model.graph)
        if not names:
            raise EngineError(f"{graph} has no layer that computes in {precision}: build it in --precision fp16.")
        run(
            str(alone),
            quantize_mode=precision,
            output_path=str(made),
            nodes_to_quantize=[f"{re.escape(name)}$" for name in names],
            op_types_to_quantize=sorted({node.op_type for node in model.graph if node.name in names}),
            calibration_data_reader=_Reader(recording),
            calibration_method="max",  # ranges change along a trajectory, and each step must fit
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",  # no conversion of its own: the graph is in FP16 where it may be
            use_external_data_format=True,
            log_level="ERROR",
        )
        quantized = ir.external_data.load_to_model(ir.load(made))  # its scales; weights are shared
        return save_typed(quantized, out, reference=reference)


class _Reader:
    """A recording as ONNX Runtime's calibration reads it."""

    def __init__(self, recording: Sequence[Mapping[str, Array]]) -> None:
        self._recording = recording
        self.rewind()

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self._rest, None)

    def get_first(self) -> Mapping[str, Array]:
        return self._recording[0]

    def rewind(self) -> None:
        self._rest = iter(self._recording)


@contextmanager
def _quiet_modelopt() -> Iterator[Any]:
    """ModelOpt's `quantize`, without its log and bars on standard output, and the warnings of what it imports."""
    modelopt_version()
    silenced = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        logging.disable(logging.CRITICAL)
        try:
            from modelopt.onnx.quantization import quantize as run  # noqa: PLC0415 - seconds, and torch

            yield run
        except ImportError as error:
            raise EngineError(
                f"FP8 and INT8 for TensorRT need the package {error.name}: {install_command('quantize')}"
            ) from error
        finally:
            logging.disable(silenced)
