"""TensorRT's builder: from an ONNX graph to a serialised engine.

TensorRT 10, 11 and TensorRT for RTX run the same code over the module that is given; RTX builds without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from importlib import import_module
from typing import Any, Protocol

from engines.backends.registry import SPECS, install_command
from engines.build.trt.errors import REDUCE, BuildError, GraphRefused, OutOfMemory, Unavailable
from engines.build.trt.layers import LayerCounts, count_fusible, inspected_layers, summarize
from engines.build.trt.log import BuildLog, is_out_of_memory
from engines.build.trt.messages import (
    BuildJob,
    BuildWarning,
    Message,
    PhaseAdvanced,
    PhaseFinished,
    PhaseStarted,
    Ranges,
)
from engines.build.trt.timings import Timings


class BuildObserver(Protocol):
    """What a builder reports to, and is cancelled by."""

    @property
    def cancelled(self) -> bool: ...

    def send(self, message: Message) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]: ...


def load_tensorrt(name: str) -> Any:
    """Import the TensorRT module `name`. Raises Unavailable if it is not installed, or needs a GPU that is missing."""
    remedy = install_command(SPECS[name].extra)
    try:
        trt = import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{name} is not installed ({error}): {remedy}.") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{name} cannot be loaded ({error}): {remedy} --force-reinstall.") from error
    count, reason = _count_gpus()
    if not count and not hasattr(trt, "ComputeCapability"):  # only RTX has this, and only it builds for absent GPUs
        raise Unavailable(
            f"{name} builds on the GPU that will run the engine, and this machine has none ({reason}): check that "
            "nvidia-smi lists it, or build with tensorrt_rtx, which needs no GPU."
        )
    return trt


def _count_gpus() -> tuple[int, str]:
    """The number of GPUs, and the reason if there are none. Without this TensorRT fails with a TypeError or worse."""
    try:
        cuda = import_module("cuda.bindings.runtime")
    except ImportError as error:
        return 0, f"{error}: {install_command('cuda')}"
    status, count = cuda.cudaGetDeviceCount()
    return (0, status.name) if int(status) else (count, "")


class TensorRtBuilder:
    """One build with the TensorRT module `trt`."""

    def __init__(self, trt: Any, observer: BuildObserver) -> None:
        self._trt = trt
        self._observer = observer
        self._log = BuildLog(warn=self._note)
        self._logger = _subclass(trt.ILogger, log=self._log.write)
        self._monitor = _subclass(
            trt.IProgressMonitor, phase_start=self._start, step_complete=self._step, phase_finish=self._finish
        )
        self._graph = {"attentions": 0, "group_norms": 0}
        self._profiles = 0
        self.reused_timings: int | None = None  # known once an engine is compiled, with a timing cache

    def compile(self, job: BuildJob) -> Any:
        """Return the serialised engine as a buffer. Raises BuildError."""
        builder = self._builder()
        network = builder.create_network(1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        with self._observer.phase("Reading the graph"):
            self._parse(network, job.onnx)
        self._graph = count_fusible(self._trt, network)
        self._profiles = len(job.profiles)
        config = self._config(builder, job.optimization_level)
        for ranges in job.profiles:
            self._add_profile(builder, config, network, ranges)
        timings = Timings(config, job.timing_cache, note=self._note) if job.timing_cache else None
        plan = builder.build_serialized_network(network, config)
        if plan is None or self._observer.cancelled:
            raise self._failure()
        if timings:
            timings.save()
            self.reused_timings = timings.reused
        return plan

    def measure(self, plan: Any) -> tuple[LayerCounts | None, list[int] | None]:
        """The engine's layers, and the bytes of device memory each profile needs; None for what is not known here."""
        layers = self._log.layers
        activations = self._log.activations if len(self._log.activations) == self._profiles else None
        if (engine := self._loaded(plan)) is not None:
            profiles = range(engine.num_optimization_profiles)
            activations = [engine.get_device_memory_size_for_profile_v2(profile) for profile in profiles]
            inspector = engine.create_engine_inspector()
            layers = layers or inspected_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return (summarize(layers, self._graph) if layers else None), activations

    def _loaded(self, plan: Any) -> Any | None:
        """The engine; None without a GPU that it supports."""
        if not _count_gpus()[0]:
            return None
        self._runtime = self._trt.Runtime(self._logger)  # has to live as long as its engines
        return self._runtime.deserialize_cuda_engine(plan)

    def _builder(self) -> Any:
        try:
            return self._trt.Builder(self._logger)
        except TypeError as error:  # pybind11's, for a null pointer
            reason = self._log.reasons() or error
            raise Unavailable(f"TensorRT does not start: {reason}. See whether nvidia-smi works.") from error

    def _config(self, builder: Any, optimization_level: int | None) -> Any:
        config = builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor
        # TF32 is on by default. Its 10 mantissa bits are too few for the schedulers' tables, which are FP32 in engines
        # of every precision, and take no measurable time.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        if flag := getattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
            config.set_flag(flag)  # RTX only: without it, it does not promise that a CUDA graph can be captured
        with suppress(AttributeError, RuntimeError):
            config.max_aux_streams = 0  # one stream is the simplest to capture
        if optimization_level is not None:
            self._search(config, optimization_level)
        return config

    def _search(self, config: Any, level: int) -> None:
        """Set how long TensorRT searches for fast kernels; from level 4 on for tilings across kernels as well."""
        trt = self._trt
        tilings = {4: trt.TilingOptimizationLevel.MODERATE, 5: trt.TilingOptimizationLevel.FULL}
        config.builder_optimization_level = level
        config.tiling_optimization_level = tilings.get(level, trt.TilingOptimizationLevel.NONE)

    def _note(self, text: str) -> None:
        self._observer.send(BuildWarning(text))

    def _parse(self, network: Any, onnx: str) -> None:
        parser = self._trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(onnx):
            reasons = "; ".join(_parser_reason(parser.get_error(index)) for index in range(parser.num_errors))
            raise GraphRefused(
                f"TensorRT does not accept {onnx}: {reasons}. Export the graph again with build_engines.py, "
                "or build for another backend."
            )

    def _add_profile(self, builder: Any, config: Any, network: Any, ranges: Ranges) -> None:
        inputs = [network.get_input(index).name for index in range(network.num_inputs)]
        if set(inputs) != set(ranges):
            raise GraphRefused(f"The graph's inputs are {inputs}, the profile's {list(ranges)}: they must be the same.")
        profile = builder.create_optimization_profile()
        for name, (smallest, optimal, largest) in ranges.items():
            profile.set_shape(name, smallest, optimal, largest)
        if config.add_optimization_profile(profile) < 0:
            raise GraphRefused(f"TensorRT does not accept the profile {dict(ranges)}: {self._log.reasons()}")

    def _failure(self) -> BuildError:
        reasons = self._log.reasons()
        if self._observer.cancelled:
            return BuildError("The build was stopped by a signal: start it again.")
        if is_out_of_memory(reasons):
            return OutOfMemory(f"TensorRT ran out of memory: {REDUCE}. TensorRT's log: {reasons}")
        return BuildError(f"TensorRT made no engine: {reasons or 'its log gives no reason'}")

    # TensorRT calls these from its own threads. Names and order of the arguments are its own.

    def _start(self, phase: str, _parent_phase: str | None, steps: int) -> None:
        self._observer.send(PhaseStarted(phase, steps))

    def _step(self, phase: str, step: int) -> bool:
        """Report that `step`, counted from 0, is done. Returns whether to continue."""
        self._observer.send(PhaseAdvanced(phase, step + 1))
        return not self._observer.cancelled

    def _finish(self, phase: str) -> None:
        self._observer.send(PhaseFinished(phase))


def _subclass(base: type, **methods: Any) -> Any:
    """An instance of a subclass of `base`, which is known only at run time, that overrides `methods`."""
    return type(base.__name__, (base,), methods)()


def _parser_reason(parser_error: Any) -> str:
    operator, reason = parser_error.node_operator(), parser_error.desc()
    if reason == "false":  # the text of an assertion that always fails
        reason = f"not supported ({parser_error.code().name})"
    return f"node {parser_error.node_name()!r} ({operator}): {reason}" if operator else reason
