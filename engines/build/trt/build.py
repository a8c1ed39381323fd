"""ONNX to a TensorRT engine, in a process of its own: a failed build can spoil the next one in the same process.

`build_engine` starts this module as a program, hands it the job as JSON and hears a JSON line for everything that
happens. TensorRT 10 and 11 and TensorRT-RTX take the same path over whichever module is named; only RTX builds without
a GPU.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypedDict

from engines.backends.registry import EXTRAS
from engines.errors import EngineError
from engines.progress import Progress, Stage

_MODULES = ("tensorrt", "tensorrt_rtx")
_LESS = "ask for fewer --resolution, --rows or --decode-batch"
_GRACE = 3.0  # seconds in which a cancelled build may end by itself
_HEARTBEAT = 0.5  # seconds: how often the child tells its memory, and so finds out whether the parent still listens

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]  # by input: least, best, largest


class BuildError(EngineError):
    """TensorRT made no engine."""


class Unavailable(BuildError):
    """TensorRT, or the GPU that it builds on, is not there."""


class GraphRefused(BuildError):
    """TensorRT does not take the ONNX graph, or the shapes asked for are not the graph's."""


class OutOfMemory(BuildError):
    """The build needs more memory than there is."""


class NotWritten(BuildError):
    """The engine cannot be written where it was asked for."""


_ERRORS: dict[str, type[BuildError]] = {
    kind.__name__: kind for kind in (BuildError, Unavailable, GraphRefused, OutOfMemory, NotWritten)
}


class LayerCounts(TypedDict):
    """What the compiler made of a graph, in the profile that came out worst."""

    total: int
    attentions: int  # of the graph
    fused_attentions: int
    group_norms: int  # of the graph
    fused_group_norms: int
    precisions: dict[str, int]  # layers by the type they write: Half, Float, Int64 …


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How a build went. What neither TensorRT's log nor the loaded engine told is None."""

    layers: LayerCounts | None
    seconds: float  # of compiling
    memory: int  # bytes of main memory at the peak; 0 where the system does not tell
    activations: tuple[int, ...] | None  # bytes of device memory by profile


# The parent's side.


def build_engine(module: str, onnx: Path, out: Path, profiles: Sequence[Ranges], *, progress: Progress) -> EngineReport:
    """Compile the graph at `onnx` to `out`, optimised for `profiles` in their order, with "tensorrt" or "tensorrt_rtx".

    `out` is replaced when the engine is whole and on disk; otherwise it stays what it was.

    Raises:
        BuildError: one of its kinds says what is missing: the package, a GPU, an operator, memory, room on disk.
        KeyboardInterrupt: the build was cancelled; its process has ended.
    """
    if module not in _MODULES:
        raise Unavailable(f"There is no TensorRT called {module!r}: choose one of {', '.join(_MODULES)}.")
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    paths = {"onnx": str(onnx), "out": str(out), "beside": str(beside)}
    job = {"module": module, **paths, "profiles": [dict(profile) for profile in profiles]}
    try:
        with tempfile.TemporaryFile() as stderr, _running(job, stderr) as child:
            return _follow(child, stderr, progress)
    finally:
        _remove(beside)


@contextmanager
def _running(job: Mapping[str, Any], stderr: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The building process, at work on `job`. It does not outlive the context."""
    # It imports what we import, from where we do, and nothing from the folder that it happens to be started in.
    here = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*(path or here for path in sys.path), here])}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "engines.build.trt.build"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    try:
        assert child.stdin  # noqa: S101 - piped above
        with suppress(BrokenPipeError), child.stdin:
            json.dump(job, child.stdin)
        yield child
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    """Let the child cancel its build, and kill it if that takes longer than the grace."""
    assert child.stdout  # noqa: S101 - piped in _running
    child.stdout.close()  # so that it is not stuck telling us something
    child.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:
        child.kill()
        child.wait()


def _follow(child: subprocess.Popen[str], stderr: IO[bytes], progress: Progress) -> EngineReport:
    """Pass on what the child tells until it reports or fails."""
    memory = 0
    with _Phases(progress) as phases:
        for said in _heard(child):
            match said:
                case {"memory": now}:
                    memory = now
                case {"note": text}:
                    progress.note(text)
                case {"error": kind, "message": message}:
                    raise _ERRORS[kind](message)
                case {"report": facts}:
                    return _report(facts)
                case _:
                    phases.hear(said)
    raise _unexpected_end(child.wait(), memory, stderr)


def _heard(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert child.stdout  # noqa: S101 - piped in _running
    for line in child.stdout:
        if line.endswith("\n"):  # a killed child may leave half a line
            yield json.loads(line)


def _report(facts: dict[str, Any]) -> EngineReport:
    activations = facts.pop("activations")
    return EngineReport(**facts, activations=None if activations is None else tuple(activations))


def _unexpected_end(status: int, memory: int, stderr: IO[bytes]) -> BuildError:
    """Why a child ended without a word. `memory` is what it was last known to take, in bytes."""
    if status == -9:  # SIGKILL, which only some systems know by name
        return OutOfMemory(
            f"The build was killed when it took {_size(memory)} of memory, as happens when there is no more: "
            f"{_LESS}, close other programs, or build on a machine with more memory."
        )
    stderr.seek(0)
    last = " | ".join(stderr.read().decode(errors="replace").splitlines()[-5:]) or "it said nothing"
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return BuildError(f"The process that builds the engine {how}: {last}. Build again; if it recurs, report this.")


@dataclass(eq=False, slots=True)
class _Phase:
    name: str
    total: int
    stage: Stage
    ending: ExitStack
    finished: bool = False


class _Phases:
    """TensorRT's phases as nested stages. A phase that finishes before one begun within it ends when that one does."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._open: list[_Phase] = []

    def hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"start": name, "total": total}:
                ending = ExitStack()
                stage = ending.enter_context(self._progress.stage(name))
                stage.update(0, total)
                self._open.append(_Phase(name, total, stage, ending))
            case {"step": name, "done": done}:
                for phase in self._named(name):
                    phase.stage.update(done, phase.total)
            case {"finish": name}:
                for phase in self._named(name):
                    phase.finished = True
                self._close_finished()

    def _named(self, name: str) -> list[_Phase]:
        """The phase of that name: TensorRT has one at a time."""
        return [phase for phase in self._open if phase.name == name and not phase.finished]

    def _close_finished(self) -> None:
        while self._open and self._open[-1].finished:
            self._open.pop().ending.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.pop().ending.__exit__(kind, error, trace)


# The child's side.


def main() -> int:
    """Do the job on stdin. The build has a thread of its own, so that signals are heard while it lasts."""
    job = json.load(sys.stdin)
    parent = _Parent(os.dup(1))
    os.dup2(2, 1)  # libraries print to stdout what is not ours
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, parent.stop)
    build = threading.Thread(target=_work, args=(job, parent), daemon=True)
    build.start()
    while build.is_alive():
        parent.tell(memory=_peak_memory())
        build.join(_HEARTBEAT)
        if parent.impatient:
            _remove(Path(job["beside"]))
            os._exit(1)  # TensorRT looks up only between its steps, and one may take minutes
    return 0 if parent.answered else 1


class _Parent:
    """Who is told of the build, and may cancel it: by a signal, or by being gone."""

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


def _work(job: dict[str, Any], parent: _Parent) -> None:
    try:
        parent.answer(report=_build(job, parent))
    except BuildError as error:
        parent.answer(error=type(error).__name__, message=str(error))
    except MemoryError:
        message = f"The build ran out of memory at {_size(_peak_memory())}: {_LESS}."
        parent.answer(error=OutOfMemory.__name__, message=message)
    finally:
        _remove(Path(job["beside"]))


def _build(job: dict[str, Any], parent: _Parent) -> dict[str, Any]:
    """Do the whole job. Returns the fields of EngineReport."""
    started = time.monotonic()
    out, beside = Path(job["out"]), Path(job["beside"])
    compiler = _Compiler(_load(job["module"]), parent)
    _check_writable(out, beside)
    plan = compiler.compile(job["onnx"], job["profiles"])
    seconds, memory = time.monotonic() - started, _peak_memory()
    layers, activations = compiler.measure(plan)
    with parent.phase("Writing the engine"):  # last: where anything fails, the older engine stays
        _write(plan, out, beside)
    return {"layers": layers, "seconds": seconds, "memory": memory, "activations": activations}


def _load(name: str) -> Any:
    """Import the TensorRT called `name`, having made sure that it can build here."""
    remedy = f"pip install 'latentd[{EXTRAS[name]}]'"
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
        return 0, f"{error}: pip install 'latentd[cuda]'"
    status, count = cuda.cudaGetDeviceCount()
    return (0, status.name) if int(status) else (count, "")


class _Compiler:
    """One build with the TensorRT module `trt`."""

    def __init__(self, trt: Any, parent: _Parent) -> None:
        self._trt = trt
        self._parent = parent
        self._log = _Log(parent)
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
        self._graph = _fusible(self._trt, network)
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
        kernels = self._log.kernels
        activations = self._log.activations if len(self._log.activations) == self._profiles else None
        if (engine := self._loaded(plan)) is not None:
            profiles = range(engine.num_optimization_profiles)
            activations = [engine.get_device_memory_size_for_profile_v2(profile) for profile in profiles]
            inspector = engine.create_engine_inspector()
            kernels = kernels or _inspected(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return (_summary(kernels, self._graph) if kernels else None), activations

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
            return OutOfMemory(f"TensorRT ran out of memory, {_LESS}. It said: {reasons}")
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


def _fusible(trt: Any, network: Any) -> dict[str, int]:
    """Count the attentions and GroupNorms of the graph as it was parsed."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    norms = [layer for layer in layers if layer.type == trt.LayerType.NORMALIZATION]
    return {
        "attentions": sum(layer.type == trt.LayerType.SOFTMAX for layer in layers),
        "group_norms": sum(_is_group_norm(tuple(layer.get_input(1).shape)) for layer in norms),
    }


def _is_group_norm(scale: Shape) -> bool:
    """Whether a normalisation whose scale has this shape is over groups [1, G, 1], rather than features [1, 1, C]."""
    return len(scale) > 2 and scale[1] != 1 and scale[-1] == 1


# What became of the layers.

_KERNEL = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: ", re.MULTILINE)
_WRITES = re.compile(r", Outputs: \[ *\{.*?(?:Format/)?Datatype: (?P<type>[^,}]+)")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_COMPILED = re.compile(r"_myl(\d+)_\d+$")  # the compiler numbers the subgraphs that it is given
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|could not be allocated", re.IGNORECASE)
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_INT64 = "has Int64 binding"  # said of every index input; that is how they are bound
_NO_DRIVER = "cudaError 35"  # follows every error of TensorRT-RTX where there is no driver, which it does not need


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A layer of the engine, often made of many of the graph's."""

    name: str
    profile: int | None  # None where it has to be inferred
    writes: str | None  # the type of its first output

    @property
    def subgraph(self) -> str | None:
        found = _COMPILED.search(self.name)
        return found and found[1]


@dataclass(slots=True)
class _Log:
    """What of TensorRT's log is worth remembering: the last errors, the engine's layers, and the memory they take."""

    parent: _Parent
    kernels: list[_Kernel] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)  # bytes, by profile
    _errors: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def write(self, severity: Any, text: str) -> None:
        """Hear one message. TensorRT calls this, from its own threads."""
        if severity <= severity.ERROR:
            self._errors.append(text.strip())
        elif severity == severity.WARNING:
            if _INT64 not in text:
                self.parent.tell(note=text.strip())
        elif _KERNEL.search(text):
            self.kernels = _logged(text)
        elif found := _ACTIVATIONS.search(text):
            self.activations.append(int(found[1]))

    def reasons(self) -> str:
        """The last errors, oldest first."""
        errors = [text for text in self._errors if _NO_DRIVER not in text]
        return "; ".join((errors or list(self._errors))[-3:])


def _logged(table: str) -> list[_Kernel]:
    """Read the table that TensorRT logs at the end of a build."""
    lines = ((found, line) for line in table.splitlines() if (found := _KERNEL.match(line)))
    return [_Kernel(found["name"], _profile(line), _written(line)) for found, line in lines]


def _inspected(information: str) -> list[_Kernel]:
    """Read the engine inspector's JSON. Of layers that it tells by name only, the type stays unknown."""
    kernels: list[_Kernel] = []
    for told in json.loads(information)["Layers"]:
        facts: dict[str, Any] = {"Name": told} if isinstance(told, str) else told
        outputs: list[dict[str, str]] = facts.get("Outputs", [])
        first = outputs[0] if outputs else {}
        writes = first.get("Datatype", first.get("Format/Datatype"))
        kernels.append(_Kernel(facts["Name"], _profile(json.dumps(facts)), writes))
    return kernels


def _profile(description: str) -> int | None:
    found = _PROFILE.search(description)
    return int(found[1]) if found else None


def _written(line: str) -> str | None:
    found = _WRITES.search(line)
    return found["type"].strip() if found else None


def _summary(kernels: Iterable[_Kernel], graph: Mapping[str, int]) -> LayerCounts:
    """Describe the profile in which least is fused."""
    return min(
        (_counts(of_profile, graph) for of_profile in _by_profile(list(kernels))),
        key=lambda counts: counts["fused_attentions"] + counts["fused_group_norms"],
    )


def _by_profile(kernels: list[_Kernel]) -> list[list[_Kernel]]:
    """Sort by profile. One that names none belongs with its subgraph; a subgraph that names none is the first's."""
    of_subgraph = {kernel.subgraph: kernel.profile for kernel in kernels if kernel.profile is not None}
    profiles: dict[int, list[_Kernel]] = {}
    for kernel in kernels:
        inferred = of_subgraph.get(kernel.subgraph, 0) if kernel.subgraph is not None else 0
        profiles.setdefault(inferred if kernel.profile is None else kernel.profile, []).append(kernel)
    return list(profiles.values())


def _counts(kernels: list[_Kernel], graph: Mapping[str, int]) -> LayerCounts:
    return {
        "total": len(kernels),
        "attentions": graph["attentions"],
        "fused_attentions": sum("_gemm_mha" in kernel.name for kernel in kernels),
        "group_norms": graph["group_norms"],
        "fused_group_norms": sum("Gnor" in kernel.name for kernel in kernels),
        "precisions": dict(Counter(kernel.writes for kernel in kernels if kernel.writes)),
    }


# Files and memory.


def _check_writable(out: Path, beside: Path) -> None:
    """Find out before the build, not after."""
    try:
        beside.touch()
    except OSError as error:
        raise NotWritten(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error


def _write(plan: Any, out: Path, beside: Path) -> None:
    """Write beside, flush to disk, rename."""
    content = memoryview(plan)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    except OSError as error:
        raise NotWritten(_why_not_written(error, out, content.nbytes)) from error


def _why_not_written(error: OSError, out: Path, needed: int) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        free = _size(shutil.disk_usage(out.parent).free)
        return (
            f"There is no room for {out} ({error.strerror}): it takes {_size(needed)}, {free} are free. "
            "Make room, or choose another --out."
        )
    return f"{out} cannot be written: {error.strerror}. Choose another --out."


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _peak_memory() -> int:
    """Bytes of main memory that this process took at most; 0 where the system does not tell.

    Not getrusage: what it tells of a process includes what its parent took before it started it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
