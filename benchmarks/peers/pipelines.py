"""Compares with other pipelines on a CPU: pictures of the same model, one at a time; one run, one table.

python -m benchmarks.peers.pipelines --out DIR --peers-python VENV/bin/python   all systems
python -m benchmarks.peers.pipelines --out DIR --only torch-eager openvino         some of them
python -m benchmarks.peers.pipelines --out DIR --resume                            goes on where the last call ended

VENV has what pipelines.txt lists. It writes DIR/peers.json, DIR/peers.md and the pictures as they come. Models
are made where they are missing, which takes minutes and gigabytes; with --prepare nothing else is done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.models import adapted
from benchmarks.peers.pipelines_report import EAGER, FULL_EAGER, Record, Settings, Turn, cells, measured, page
from benchmarks.peers.processes import ROOT, Pipeline, Running, Server, Wish, complaint_in
from engines.backends.available import precision_of
from engines.errors import EngineError
from engines.files import write_atomically
from engines.manifest import BundleError, Manifest
from loadtest.options import count, size
from loadtest.provenance import begin_run, now

_STEPS = {"256x256": 20, "512x512": 4}
_GUIDANCE = 7.5
_ROWS = 2  # of the UNet, all that one guided picture takes: nobody else is made ready for more
_PROMPTS = (
    "a photograph of a lighthouse on a rock in the sea",
    "a lighthouse in the sea on a photograph of a rock",
    "a rock in the sea, a lighthouse on a rock",
    "the sea, a photograph",
)
_WARM_UP = "a photograph", 1_000_000, 1  # prompt, seed, steps
_WIDTH = 160
_PACKAGES = (
    "import json, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)
_WRITE_CHECKPOINT = (
    "import sys; from pathlib import Path; from benchmarks.models import checkpoint_of, subject; "
    "checkpoint_of(subject(sys.argv[1], Path(sys.argv[2])))"
)
_INVOLVED = re.compile(r"torch|diffusers|transformers|optimum|openvino|nncf|stable.diffusion|numpy|tokenizers")

Kind = Literal["eager", "compiled", "optimum", "genai", "stable-diffusion.cpp", "server"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """Someone who draws pictures."""

    name: str
    title: str
    kind: Kind
    model: str = "small"  # an architecture of benchmarks.models
    made: str = "checkpoint"  # what it reads, of all that is made of the model
    packages: tuple[str, ...] = ()  # that --peers-python must have
    backend: str = ""  # of our server
    exact: bool = False  # whether OpenVINO is kept from BF16, which it takes unasked where the processor has it
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a request to it
    alike: bool = True  # whether its pictures should be torch-eager's


_OPTIMUM = ("optimum-intel", "openvino")
_GENAI = ("openvino-genai", "openvino-tokenizers")
_CPP = ("stable-diffusion-cpp-python",)
_FAST = {"cache": "fast"}
INSTALL = {
    "optimum-intel": "pip install --no-deps optimum-intel, and what benchmarks/peers/pipelines.txt lists",
    "openvino": "pip install openvino",
    "openvino-genai": "pip install openvino-genai",
    "openvino-tokenizers": "pip install openvino-tokenizers",
    "stable-diffusion-cpp-python": "pip install stable-diffusion-cpp-python (needs a C++ compiler)",
}
CONTESTANTS = (
    Contestant(EAGER, "diffusers, PyTorch eager", "eager"),
    Contestant(FULL_EAGER, "diffusers, PyTorch eager, SD 1.4", "eager", model="sd15", alike=False),
    Contestant("torch-compile", "diffusers, torch.compile", "compiled"),
    Contestant("optimum", "optimum-intel", "optimum", made="optimum-fp32", packages=_OPTIMUM),
    Contestant("optimum-int8", "optimum-intel, INT8 weights", "optimum", made="optimum-int8", packages=_OPTIMUM),
    Contestant("genai", "openvino-genai (C++)", "genai", made="optimum-fp32", packages=_OPTIMUM + _GENAI),
    Contestant(
        "genai-fp32",
        "openvino-genai, kept to FP32",
        "genai",
        made="optimum-fp32",
        packages=_OPTIMUM + _GENAI,
        exact=True,
    ),
    Contestant("sdcpp", "stable-diffusion.cpp", "stable-diffusion.cpp", packages=_CPP, alike=False),
    Contestant(
        "sdcpp-sd14", "stable-diffusion.cpp, SD 1.4", "stable-diffusion.cpp", "sd15", packages=_CPP, alike=False
    ),
    Contestant("onnxruntime", "ours, ONNX Runtime", "server", made="bundle", backend="onnxruntime"),
    Contestant(
        "onnxruntime-fast", "ours, ONNX Runtime, fast", "server", made="bundle", backend="onnxruntime", fields=_FAST
    ),
    Contestant("openvino", "ours, OpenVINO", "server", made="bundle", backend="openvino"),
    Contestant("openvino-fast", "ours, OpenVINO, fast", "server", made="bundle", backend="openvino", fields=_FAST),
    Contestant("openvino-bf16", "ours, OpenVINO BF16", "server", made="bundle-bf16", backend="openvino"),
    Contestant(
        "openvino-bf16-fast",
        "ours, OpenVINO BF16, fast",
        "server",
        made="bundle-bf16",
        backend="openvino",
        fields=_FAST,
    ),
    Contestant("openvino-int8", "ours, OpenVINO INT8", "server", made="bundle-int8", backend="openvino"),
    Contestant(
        "openvino-int8-fast",
        "ours, OpenVINO INT8, fast",
        "server",
        made="bundle-int8",
        backend="openvino",
        fields=_FAST,
    ),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    out: Path
    models: Path
    contestants: tuple[Contestant, ...]
    settings: Settings
    python: str
    resume: bool
    prepare: bool


class Workshop:
    """Makes what contestants read: checkpoints, exports and bundles, each once, by the commands people use."""

    def __init__(self, options: Options, packages: Mapping[str, str]) -> None:
        self._folder, self._python, self._packages = options.models, options.python, packages
        self._sizes, self._logs = tuple(options.settings.sizes), options.out / "logs"

    def ready(self, contestant: Contestant) -> Path:
        """What it reads, made if it is not there. Raises EngineError where it cannot be, or where it would not run."""
        for package in contestant.packages:
            if package not in self._packages:
                raise EngineError(f"{package} is not installed: {INSTALL[package]}")
        home = self._folder / contestant.model
        made = home / contestant.made
        match contestant.made:
            case "checkpoint":
                self._checkpoint(home)
            case "optimum-fp32" | "optimum-int8":
                self._export(home, made)
            case _:
                self._bundle(home, made, contestant.backend)
        return made

    def _checkpoint(self, home: Path) -> Path:
        checkpoint = home / "checkpoint"
        if not (checkpoint / "model_index.json").exists():
            self._run(
                [sys.executable, "-c", _WRITE_CHECKPOINT, home.name, str(self._folder)], f"{home.name}-checkpoint"
            )
        return checkpoint

    def _export(self, home: Path, made: Path) -> None:
        """By optimum-intel; beside and renamed, since a folder that is half written looks whole."""
        if made.exists():
            return
        checkpoint, beside = self._checkpoint(home), made.with_name(f".{made.name}")
        shutil.rmtree(beside, ignore_errors=True)
        words = ["export", "openvino", "--model", str(checkpoint), "--task", "text-to-image", "--library", "diffusers"]
        precision = made.name.removeprefix("optimum-")
        command = [
            self._python,
            "-m",
            "optimum.commands.optimum_cli",
            *words,
            "--weight-format",
            precision,
            str(beside),
        ]
        self._run(command, f"{home.name}-{made.name}")
        beside.rename(made)

    def _bundle(self, home: Path, made: Path, backend: str) -> None:
        """Over the graphs of the FP32 bundle, which take minutes and gigabytes, where there is one to begin from."""
        plain, _, precision = made.name.partition("-")
        if _holds(made, self._sizes, backend, precision or "fp32"):
            return
        if precision and not made.exists():
            self._bundle(home, home / plain, backend)
            shutil.copytree(home / plain, made)  # no links, of which onnx suspects an attack
        build = [sys.executable, str(ROOT / "build_engines.py"), "--model", str(self._checkpoint(home))]
        sizes = ["--resolution", *self._sizes, "--rows", str(_ROWS)]
        backends = ["--backend", "openvino"]
        backends += ["--precision", precision] if precision else ["--backend", "onnxruntime"]
        name = ["--name", home.name, "--out", str(made)]
        self._run([*build, *name, *sizes, *backends, "--no-verify"], f"{home.name}-{made.name}")

    def _run(self, command: Sequence[str], name: str) -> None:
        """In a process of its own, whose memory is free again afterwards."""
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        with path.open("w", encoding="utf-8") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)  # noqa: S603 - ours
        if done.returncode:
            said = complaint_in(path.read_text(encoding="utf-8", errors="replace"))
            raise EngineError(f"{name} could not be made, exit code {done.returncode} ({said}): see {path}")


class Comparison:
    """Gives each contestant its turns, and keeps what they did as soon as it is known."""

    def __init__(self, options: Options, record: Record, workshop: Workshop) -> None:
        self.options, self.record, self._workshop = options, record, workshop

    def due(self) -> list[tuple[Contestant, str, int]]:
        """Small pictures first; in each round everyone has a turn."""
        settings = self.options.settings
        turns = [
            (contestant, size, number)
            for size in settings.sizes
            for number in range(settings.rounds)
            for contestant in self.options.contestants
        ]
        return [turn for turn in turns if not self._kept(turn)]

    def take(self, contestant: Contestant, size: str, number: int) -> Turn:
        run = len(self.record.runs) - 1
        turn = Turn(contestant=contestant.name, size=size, round=number, run=run)
        try:
            turn = self._measure(contestant, turn)
        except EngineError as error:
            turn = turn.model_copy(update={"note": str(error)})
        self.record.put(turn)
        self.save()
        return turn

    def save(self) -> None:
        self.record.runs[-1] = self.record.runs[-1].model_copy(update={"ended": now()})
        titles = [(one.name, one.title) for one in CONTESTANTS]
        write_atomically(self.options.out / "peers.json", self.record.model_dump_json(indent=1).encode())
        write_atomically(self.options.out / "peers.md", page(self.record, titles).encode())

    def _kept(self, turn: tuple[Contestant, str, int]) -> bool:
        contestant, size, number = turn
        found = self.record.find((contestant.name, size, number))
        return found is not None and bool(found.seconds)

    def _measure(self, contestant: Contestant, turn: Turn) -> Turn:
        """Raises EngineError."""
        settings, pictures = self.options.settings, self._pictures(contestant.name, turn.size)
        pictures.mkdir(parents=True, exist_ok=True)
        width, height = map(int, turn.size.split("x"))

        def wish(prompt: str, seed: int, steps: int) -> Wish:
            return Wish(prompt, seed, steps, (width, height), settings.guidance, pictures / f"{seed}.png")

        made = self._workshop.ready(contestant)
        with self._started(contestant, made, turn) as running:
            warm_up = running.draw(wish(*_WARM_UP))
            seconds = []
            for k in range(settings.repeats):
                prompt = settings.prompts[k % len(settings.prompts)]
                seconds.append(running.draw(wish(prompt, k, settings.sizes[turn.size])))
            peak = running.close()
        if contestant.name == EAGER and settings.repeats > 1:
            self.record.apart[turn.size] = _error(pictures / "0.png", pictures / "1.png")
        found = {"startup": running.startup, "warm_up": warm_up, "seconds": tuple(seconds), "peak_bytes": peak}
        return turn.model_copy(update={**found, "errors": self._errors(contestant, turn.size)})

    @contextmanager
    def _started(self, contestant: Contestant, made: Path, turn: Turn) -> Iterator[Running]:
        settings, options = self.options.settings, self.options
        log = options.out / "logs" / f"{contestant.name}-{turn.size}-{turn.round}.log"
        running: Running
        with tempfile.TemporaryDirectory() as folder:
            if contestant.kind == "server":
                bundle, fields = _of_size(made, turn.size, Path(folder)), contestant.fields
                running = Server(bundle, contestant.backend, log, threads=settings.threads, fields=fields)
            else:
                width, height = map(int, turn.size.split("x"))
                spec = {"kind": contestant.kind, "model": str(made.resolve()), "width": width, "height": height}
                spec |= {"threads": settings.threads, "guidance": settings.guidance, "exact": contestant.exact}
                # Compiled anew each time, as on a machine that never did.
                variables = {"OMP_NUM_THREADS": str(settings.threads), "TORCHINDUCTOR_CACHE_DIR": folder}
                python = options.python if contestant.packages else sys.executable
                running = Pipeline(python, spec, log, variables=variables)
            try:
                yield running
            finally:
                running.close()

    def _errors(self, contestant: Contestant, size: str) -> tuple[float, ...]:
        """Of each picture from torch-eager's; none where that has not drawn, or has drawn another model's."""
        own, reference = (self._pictures(name, size) for name in (contestant.name, EAGER))
        if not contestant.alike or contestant.name == EAGER:
            return ()
        names = [f"{k}.png" for k in range(self.options.settings.repeats)]
        return tuple(_error(own / name, reference / name) for name in names if (reference / name).exists())

    def _pictures(self, name: str, size: str) -> Path:
        return self.options.out / "pictures" / size / name


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(words)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        packages = _packages(options.python)
        workshop = Workshop(options, packages)
        if options.prepare:
            return _prepare(options, workshop, console)
        record = _record(options)
    except EngineError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    record.runs.append(begin_run(["python", "-m", "benchmarks.peers.pipelines", *words]))
    record.peers_packages = {name: version for name, version in sorted(packages.items()) if _INVOLVED.search(name)}
    comparison = Comparison(options, record, workshop)
    with _progress(console) as progress:
        due = comparison.due()
        task = progress.add_task("", total=len(due))
        for contestant, size, number in due:
            progress.update(task, description=f"{size} {contestant.name}")
            turn = comparison.take(contestant, size, number)
            if turn.note:
                console.print(f"{size} {contestant.name}: {escape(turn.note)}", style="yellow", soft_wrap=True)
            progress.advance(task)
    comparison.save()
    for size in options.settings.sizes:
        console.print(_table(record, size))
    console.print(f"raw: {options.out / 'peers.json'}", highlight=False, soft_wrap=True)
    return 0


def _prepare(options: Options, workshop: Workshop, console: Console) -> int:
    """Make what is missing; whether something could not be made."""
    failed = 0
    for contestant in options.contestants:
        console.print(f"{contestant.name} …", style="dim")
        try:
            workshop.ready(contestant)
        except EngineError as error:
            failed = 1
            console.print(f"{contestant.name}: {escape(str(error))}", style="yellow", soft_wrap=True)
    return failed


def _record(options: Options) -> Record:
    """The one to go on with, or a new one. Raises EngineError where results would be mixed or lost."""
    path = options.out / "peers.json"
    if not path.exists():
        return Record(settings=options.settings)
    if not options.resume:
        raise EngineError(f"{path} holds results: go on with --resume, or choose another --out.")
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise EngineError(f"{path} cannot be read: {error}") from None
    if record.settings != options.settings:
        raise EngineError(
            f"{path} was measured otherwise ({record.settings}): give the same options, or another --out."
        )
    return record


def _packages(python: str) -> dict[str, str]:
    """All packages of an interpreter. Raises EngineError where it does not run."""
    with suppress(OSError):
        done = subprocess.run([python, "-c", _PACKAGES], capture_output=True, text=True, check=False)  # noqa: S603 - ours
        if done.returncode == 0:
            found: dict[str, str] = json.loads(done.stdout)
            return {name.replace("_", "-"): version for name, version in found.items()}
    raise EngineError(f"{python} does not run: name an interpreter with --peers-python.")


def _holds(bundle: Path, sizes: Sequence[str], backend: str, precision: str) -> bool:
    with suppress(BundleError):
        manifest = Manifest.read(bundle)
        built = backend in manifest.builds and precision_of(manifest, backend) == precision
        return built and manifest.max_rows == _ROWS and set(sizes) <= set(map(str, manifest.resolutions))
    return False


def _of_size(bundle: Path, size: str, folder: Path) -> Path:
    """The bundle in `folder`, made ready for one size alone, as the others are."""
    alone = tuple(one for one in Manifest.read(bundle).resolutions if str(one) == size)
    return adapted(bundle, folder, resolutions=alone)


def _error(one: Path, other: Path) -> float:
    """Mean squared difference of two pictures, of colours 0 to 255."""
    a, b = (np.asarray(PIL.Image.open(path).convert("RGB"), np.float64) for path in (one, other))
    return float(np.mean((a - b) ** 2))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _table(record: Record, size: str) -> Table:
    made = Table(title=f"{size}, {record.settings.sizes[size]} steps")
    made.add_column("contestant")
    for heading in ("s per image", "× eager", "× SD 1.4 eager", "start-up", "GiB", "of eager's", "PSNR"):
        made.add_column(heading, justify="right")
    for one in CONTESTANTS:
        found = measured(record, one.name, size)
        if found.seconds is not None:
            made.add_row(one.title, *cells(record, one.name, size))
    return made


def _options(words: Sequence[str]) -> Options:
    parser = _parser()
    given = parser.parse_args(words)
    by_name = {one.name: one for one in CONTESTANTS}
    if unknown := set(given.only) - set(by_name):
        parser.error(f"there is no {', '.join(sorted(unknown))}: {', '.join(by_name)}")
    sizes = {size: given.steps or _STEPS.get(size, max(_STEPS.values())) for size in map(str, given.size or _STEPS)}
    return Options(
        out=given.out,
        models=given.models or given.out / "models",
        contestants=tuple(one for one in CONTESTANTS if not given.only or one.name in given.only),
        settings=Settings(
            sizes=sizes,
            repeats=given.repeats,
            rounds=given.rounds,
            guidance=_GUIDANCE,
            threads=given.threads,
            prompts=tuple(given.prompt or _PROMPTS),
        ),
        python=given.peers_python,
        resume=given.resume,
        prepare=given.prepare,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.pipelines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, "default: %(default)s"
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--models", type=Path, metavar="DIR", help="where checkpoints, exports and bundles lie (default: OUT/models)")
    add("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(one.name for one in CONTESTANTS)}")
    add(
        "--peers-python",
        default=sys.executable,
        metavar="PATH",
        help="an interpreter with what benchmarks/peers/pipelines.txt lists",
    )
    add("--size", type=size, action="append", metavar="WxH", help="repeatable (default: 256x256 and 512x512)")
    add("--steps", type=count, metavar="N", help="at every size (default: 20, and 4 at 512x512)")
    add("--repeats", type=count, default=2, metavar="K", help=f"pictures of each turn ({default})")
    add(
        "--rounds",
        type=count,
        default=1,
        metavar="N",
        help=f"turns of each, and everyone before a second ({default})",
    )
    add("--threads", type=count, default=len(os.sched_getaffinity(0)), help=f"of each contestant ({default})")
    add("--prompt", action="append", metavar="TEXT", help="repeatable; pictures take them in turns")
    add("--resume", action="store_true", help="keep what was measured, and go on")
    add("--prepare", action="store_true", help="make models that are missing, and measure nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
