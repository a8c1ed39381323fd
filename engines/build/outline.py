"""How far a build is: the stages to come by name, what each costs beside the others, and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from engines.backends.registry import ONNXRUNTIME_CUDA, TENSORRT
from engines.build.qdq.quantize import EIGHT_BITS
from engines.build.trajectory import CALIBRATED
from engines.checkpoints.checkpoint import Checkpoint
from engines.contract import GRAPHS, GraphName
from engines.manifest import ComputeDtype, Precision, Size

# What a stage costs, relative to others, by the words in its name: the work, times the graph. The first match counts.
_WORK = {"exporting": 4, "compiling": 4, "quantizing": 4, "recording": 20, "drawing": 4, "loading": 2, "computing": 2}
_GRAPHS = {"denoise_shallow": 3, "denoise": 4, "decode_fast": 1, "decode": 2, "encode_image": 2, "safety": 2}
_FIRST_CALIBRATED = next(name for name in GRAPHS if name in CALIBRATED)
_FIRST_ESTIMATE = 0.05  # of the build: an estimate of the rest from less would be a guess


class Outline:
    """The outermost stages of a build: those that have ended, the one in progress, and those that are expected."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._ended: list[str] = []
        self._current: str | None = None
        self._to_come: list[str] = []
        self._announced = False

    def expect(self, stages: Sequence[str]) -> None:
        """Announce the stages to come. What came before, such as a download, does not count."""
        self._began, self._ended, self._announced = self._clock(), [], True
        self._to_come = list(stages)

    def begin(self, name: str) -> None:
        """Begin a stage. Expected ones before it were skipped; one that was not expected counts all the same."""
        if name in self._to_come:
            self._to_come = self._to_come[self._to_come.index(name) + 1 :]
        self._current = name

    def end(self) -> None:
        if self._current:
            self._ended.append(self._current)
        self._current = None

    def position(self) -> tuple[str, ...]:
        """The number of the stage in progress and how many there are, as `[3/14]`; nothing where none was expected."""
        if not self._announced:
            return ()
        done = len(self._ended) + 1
        return (f"[{done}/{done + len(self._to_come)}]",)

    def fraction(self, current: float) -> float:
        """The finished fraction of the build, of whose stage in progress the fraction `current` is finished."""
        done, cost = sum(map(_cost, self._ended)), _cost(self._current) if self._current else 0.0
        total = done + cost + sum(map(_cost, self._to_come))
        return (done + cost * current) / total if total else 0.0

    def time_left(self, fraction: float) -> str:
        """An estimate such as `about 3 min left`; empty while it would be a guess."""
        if not _FIRST_ESTIMATE <= fraction < 1:
            return ""
        seconds = (self._clock() - self._began) * (1 - fraction) / fraction
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def _cost(name: str) -> float:
    if name.startswith("exporting") and "_lora" in name:
        return 1.0  # the plain graph with nodes added
    work, graph = (next((cost for word, cost in table.items() if word in name), 1) for table in (_WORK, _GRAPHS))
    return float(work * graph)


def export_stages(
    checkpoint: Checkpoint,
    graphs: Sequence[GraphName],
    dtypes: Iterable[tuple[GraphName, ComputeDtype]],
    size: Size,
) -> Iterator[str]:
    """The stages of an export of `graphs`, in FP32 and in `dtypes`."""
    typed = sorted(dtypes)
    yield "loading torch"
    if checkpoint.single_file:
        yield f"converting {checkpoint.path.name}"
    yield "reading the weights"
    yield from (f"measuring the range of {name} at {size}" for name in checkpoint.graphs if (name, "fp16") in typed)
    for name in graphs:
        yield f"exporting {name}"
        yield f"checking {name}.onnx against torch"
        for precision in [precision for graph, precision in typed if graph == name]:
            yield f"exporting {name} in {precision}"
            yield f"checking {name}.{precision}.onnx against torch"
    yield "fitting previews"


def compile_stages(backend: str, precisions: Mapping[GraphName, Precision], *, verify: bool) -> Iterator[str]:
    """The stages of compiling all engines of a backend, and of verifying them if `verify`."""
    for name, precision in precisions.items():
        if precision in EIGHT_BITS:
            if name == _FIRST_CALIBRATED:
                yield "recording trajectories to calibrate on"
            yield f"quantizing {name} to {precision}" if backend in TENSORRT else f"quantizing {name}"
            if backend in TENSORRT:
                yield f"comparing {name} in {precision} with FP32 on the CPU"
        if backend in {*TENSORRT, ONNXRUNTIME_CUDA}:
            yield f"compiling {name} for {backend}"
    if verify:
        yield "drawing an image in FP32"
        yield from (f"computing {name} in FP32" for name in precisions)
        yield from (f"verifying {name} of {backend}" for name in precisions)
        yield f"drawing an image on {backend}"
