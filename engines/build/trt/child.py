"""The process that builds one engine: reads the job from stdin, and writes a JSON line for every event.

TensorRT 10, 11 and TensorRT for RTX take the same path over the module that is named; RTX builds without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.backends.registry import SPECS, install_command
from engines.build.trt.disk import check_writable, peak_memory, remove, write_engine
from engines.build.trt.errors import REDUCE, BuildError, GraphRefused, OutOfMemory, Unavailable, format_bytes
from engines.build.trt.layers import (
    EngineLayer,
    LayerCounts,
    count_fusible,
    inspected_layers,
    is_layer_table,
    logged_layers,
    summarize,
)

_GRACE = 3.0  # seconds in which a cancelled build may end by itself
_HEARTBEAT = 0.5  # seconds between reports of memory, which also show whether the parent still listens

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]  # by input: smallest, optimal, largest

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|could not be allocated", re.IGNORECASE)
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_INT64 = "has Int64 binding"  # said of every index input; that is how they are bound
_NO_DRIVER = "cudaError 35"  # follows every error of TensorRT-RTX where there is no driver, which it does not need


def main() -> int:
    """Do the job on stdin. The build has a thread of its own, so that signals are heard while it lasts."""
    job = json.load(sys.stdin)
    parent = _ParentConnection(os.dup(1))
    os.dup2(2, 1)  # libraries print to stdout what is not ours
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, parent.stop)
    build = threading.Thread(target=_work, args=(job, parent), daemon=True)
    build.start()
    while build.is_alive():
        parent.tell(memory=peak_memory())
        build.join(_HEARTBEAT)
        if parent.impatient:
            remove(Path(job["beside"]))
            os._exit(1)  # TensorRT looks up only between its steps, and one may take minutes
    return 0 if parent.answered else 1


class _ParentConnection:
    """The parent process: receives events of the build, and cancels it by a signal or by closing the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._one_at_a_time = threading.Lock()
        self._stopped_at: float | None = None
        self.answered = False

    @property
    def stopped(self) -> bool:
        return self._stopped_at is not None

    @property
    def impatient(self) -> bool:
        return self._stopped_at is not None and time.monotonic() > self._stopped_at + _GRACE

    def stop(self, *_: object) -> None:
        self._stopped_at = self._stopped_at or time.monotonic()

    def tell(self, **said: object) -> None:
        with self._one_at_a_time:
            try:
                self._file.write(json.dumps(said) + "\n")
                self._file.flush()
            except BrokenPipeError:
                self.stop()

    def answer(self, **said: object) -> None:
        """Tell the last word."""
        self.tell(**said)
        self.answered = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.tell(start=name, total=1)
        yield
        self.tell(finish=name)


def _work(job: dict[str, Any], parent: _ParentConnection) -> None:
    try:
        parent.answer(report=_build(job, parent))
    except BuildError as error:
        parent.answer(error=type(error).__name__, message=str(error))
    except MemoryError:
        message = f"The build ran out of memory at {format_bytes(peak_memory())}: {REDUCE}."
        parent.answer(error=OutOfMemory.__name__, message=message)
    finally:
        remove(Path(job["beside"]))


def _build(job: dict[str, Any], parent: _ParentConnection) -> dict[str, Any]:
    """Do the whole job. Returns the fields of EngineReport."""
    started = time.monotonic()
    out, beside = Path(job["out"]), Path(job["beside"])
    compiler = _TensorRtBuilder(_load(job["module"]), parent)
    check_writable(out, beside)
    plan = compiler.compile(job["onnx"], job["profiles"])
    seconds, memory = time.monotonic() - started, peak_memory()
    layers, activations = compiler.measure(plan)
    with parent.phase("Writing the engine"):  # last: where anything fails, the older engine stays
        write_engine(plan, out, beside)
    return {"layers": layers, "seconds": seconds, "memory": memory, "activations": activations}


def _load(name: str) -> Any:
    """Import the TensorRT called `name`, having made sure that it can build here."""
    remedy = install_command(SPECS[name].extra)
    try:
        trt = import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{name} is not installed ({error}): {remedy}.") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{name} cannot be loaded ({error}): {remedy} --force-reinstall.") from error
    count, why = _gpus()
    if not count and not hasattr(trt, "ComputeCapability"):  # which RTX has, and it alone builds for absent GPUs
        raise Unavailable(
            f"{name} builds on the GPU that it builds for, and there is none here ({why}): see whether nvidia-smi "
            "lists it, or build with tensorrt_rtx, which needs no GPU."
        )
    return trt


def _gpus() -> tuple[int, str]:
    """The number of CUDA devices, and if there are none, why. TensorRT's own answer would be a TypeError or worse."""
    try:
        cuda = import_module("cuda.bindings.runtime")
    except ImportError as error:
        return 0, f"{error}: {install_command('cuda')}"
    status, count = cuda.cudaGetDeviceCount()
    return (0, status.name) if int(status) else (count, "")


class _TensorRtBuilder:
    """One build with the TensorRT module `trt`."""

    def __init__(self, trt: Any, parent: _ParentConnection) -> None:
        self._trt = trt
        self._parent = parent
        self._log = _BuildLog(parent)
        self._logger = _subclass(trt.ILogger, log=self._log.write)
        self._monitor = _subclass(
            trt.IProgressMonitor, phase_start=self._start, step_complete=self._step, phase_finish=self._finish
        )
        self._graph = {"attentions": 0, "group_norms": 0}
        self._profiles = 0

    def compile(self, onnx: str, profiles: Sequence[Ranges]) -> Any:
        """Return the serialised engine as a buffer. Raises BuildError."""
        builder = self._builder()
        network = builder.create_network(1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        with self._parent.phase("Reading the graph"):
            self._parse(network, onnx)
        self._graph = count_fusible(self._trt, network)
        self._profiles = len(profiles)
        config = self._config(builder)
        for ranges in profiles:
            self._add_profile(builder, config, network, ranges)
        plan = builder.build_serialized_network(network, config)
        if plan is None or self._parent.stopped:
            raise self._failure()
        return plan

    def measure(self, plan: Any) -> tuple[LayerCounts | None, list[int] | None]:
        """What became of the layers, and the device memory that each profile needs, as far as can be told here."""
        layers = self._log.layers
        activations = self._log.activations if len(self._log.activations) == self._profiles else None
        if (engine := self._loaded(plan)) is not None:
            profiles = range(engine.num_optimization_profiles)
            activations = [engine.get_device_memory_size_for_profile_v2(profile) for profile in profiles]
            inspector = engine.create_engine_inspector()
            layers = layers or inspected_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return (summarize(layers, self._graph) if layers else None), activations

    def _loaded(self, plan: Any) -> Any | None:
        """The engine, unless there is no GPU here, or not one that it is for."""
        if not _gpus()[0]:
            return None
        self._runtime = self._trt.Runtime(self._logger)  # has to live as long as its engines
        return self._runtime.deserialize_cuda_engine(plan)

    def _builder(self) -> Any:
        try:
            return self._trt.Builder(self._logger)
        except TypeError as error:  # pybind's word for a null pointer
            reason = self._log.reasons() or error
            raise Unavailable(f"TensorRT does not start here: {reason}. See whether nvidia-smi works.") from error

    def _config(self, builder: Any) -> Any:
        config = builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self._monitor
        # TF32 is on by default and keeps 10 bits of FP32's 23, which schedulers' tables cannot spare: they are FP32 in
        # engines of every precision, and take no time that anyone would notice.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        if flag := getattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
            config.set_flag(flag)  # RTX's alone, without which it does not promise that a graph can be captured
        with suppress(AttributeError, RuntimeError):
            config.max_aux_streams = 0  # one stream, which is what a CUDA graph captures most simply
        return config

    def _parse(self, network: Any, onnx: str) -> None:
        parser = self._trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(onnx):
            reasons = "; ".join(_refusal(parser.get_error(index)) for index in range(parser.num_errors))
            raise GraphRefused(
                f"TensorRT does not take {onnx}: {reasons}. Export the graph again with build_engines.py, "
                "or build for another backend."
            )

    def _add_profile(self, builder: Any, config: Any, network: Any, ranges: Ranges) -> None:
        inputs = [network.get_input(index).name for index in range(network.num_inputs)]
        if set(inputs) != set(ranges):
            raise GraphRefused(f"The graph's inputs are {inputs}, the profile's {list(ranges)}: they must be the same.")
        profile = builder.create_optimization_profile()
        for name, (least, best, largest) in ranges.items():
            profile.set_shape(name, least, best, largest)
        if config.add_optimization_profile(profile) < 0:
            raise GraphRefused(f"TensorRT does not take the profile {dict(ranges)}: {self._log.reasons()}")

    def _failure(self) -> BuildError:
        reasons = self._log.reasons()
        if self._parent.stopped:
            return BuildError("The build was stopped by a signal: start it again.")
        if _OUT_OF_MEMORY.search(reasons):
            return OutOfMemory(f"TensorRT ran out of memory, {REDUCE}. It said: {reasons}")
        return BuildError(f"TensorRT made no engine: {reasons or 'it did not say why'}")

    # What TensorRT calls, from its own threads. Names and order of the arguments are its own.

    def _start(self, phase: str, _parent_phase: str | None, steps: int) -> None:
        self._parent.tell(start=phase, total=steps)

    def _step(self, phase: str, step: int) -> bool:
        """Hear of `step`, counted from 0. Returns whether to go on."""
        self._parent.tell(step=phase, done=step + 1)
        return not self._parent.stopped

    def _finish(self, phase: str) -> None:
        self._parent.tell(finish=phase)


def _subclass(base: type, **methods: Any) -> Any:
    """An instance of `base`, which is known at run time only, with `methods` in place of its own."""
    return type(base.__name__, (base,), methods)()


def _refusal(parser_error: Any) -> str:
    operator, reason = parser_error.node_operator(), parser_error.desc()
    if reason == "false":  # the text of an assertion that always fails
        reason = f"not supported ({parser_error.code().name})"
    return f"node {parser_error.node_name()!r} ({operator}): {reason}" if operator else reason


@dataclass(slots=True)
class _BuildLog:
    """What of TensorRT's log is worth remembering: the last errors, the engine's layers, and the memory they take."""

    parent: _ParentConnection
    layers: list[EngineLayer] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)  # bytes, by profile
    _errors: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def write(self, severity: Any, text: str) -> None:
        """Hear one message. TensorRT calls this, from its own threads."""
        if severity <= severity.ERROR:
            self._errors.append(text.strip())
        elif severity == severity.WARNING:
            if _INT64 not in text:
                self.parent.tell(note=text.strip())
        elif is_layer_table(text):
            self.layers = logged_layers(text)
        elif found := _ACTIVATIONS.search(text):
            self.activations.append(int(found[1]))

    def reasons(self) -> str:
        """The last errors, oldest first."""
        errors = [text for text in self._errors if _NO_DRIVER not in text]
        return "; ".join((errors or list(self._errors))[-3:])


if __name__ == "__main__":
    sys.exit(main())
