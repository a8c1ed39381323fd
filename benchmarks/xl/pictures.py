"""Draws pictures of few steps, on our server and on diffusers' own pipeline, one system after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict

from benchmarks.cli import ImageSize, complain, size_of
from benchmarks.peers.pipelines.runners import ImageTask, PipelineRunner, ServerRunner, SystemRunner
from engines.accuracy import psnr
from engines.backends.registry import ON_CPU
from engines.cli import CommandLine, parse
from engines.errors import EngineError
from engines.files import write_atomically
from loadtest.provenance import ResultModel, Run, begin_run

_PROMPT = "a photograph of a lighthouse on a rock in the sea"
_UNGUIDED = 1.0  # as diffusers writes it
_DIFFUSERS = "diffusers"


class Drawn(ResultModel):
    """Pictures of one system."""

    startup: float = Field(description="seconds from starting its process to being ready")
    seconds: tuple[float, ...] = Field(description="of each picture; the first warms up")
    peak_memory: int = Field(description="bytes, of its process and its children")


class Pictures(ResultModel):
    """The results file."""

    run: Run
    size: str
    steps: int
    systems: Mapping[str, Drawn]
    psnr: tuple[float, ...] = Field((), description="dB, of each picture, compared with diffusers' of the same noise")


class PicturesCommand(CommandLine):
    """Draw pictures of few steps, unguided, on our server and on diffusers in FP32.

    python -m benchmarks.xl.pictures --out DIR --bundle BUNDLE --checkpoint FOLDER

    The bundle has to be built from the checkpoint. Results go to DIR/pictures.json, and the pictures beside it.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m benchmarks.xl.pictures")

    out: Path = Field(description="folder for results")
    bundle: Path = Field(description="bundle that the server loads")
    checkpoint: Path | None = Field(None, description="diffusers folder; unless given, only the server draws")
    backend: str = Field("openvino", description=f"backend of the server, of {', '.join(ON_CPU)}")
    size: ImageSize = Field("512x512", description="WIDTHxHEIGHT of pictures")
    steps: PositiveInt = Field(4, description="denoising steps")
    images: PositiveInt = Field(3, description="pictures of each system")
    threads: PositiveInt = Field(len(os.sched_getaffinity(0)), description="CPU threads of each system")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(PicturesCommand, words)
    options.out.mkdir(parents=True, exist_ok=True)
    run = begin_run(["python", "-m", "benchmarks.xl.pictures", *words])
    try:
        systems = {name: _draw(name, start, options) for name, start in _systems(options).items()}
    except EngineError as error:
        complain(error)
        return 1
    differences = psnrs(options.out, options.backend, options.images) if _DIFFUSERS in systems else ()
    results = Pictures(run=run, size=options.size, steps=options.steps, systems=systems, psnr=differences)
    write_atomically(options.out / "pictures.json", results.model_dump_json(indent=2).encode())
    return 0


def _systems(options: PicturesCommand) -> dict[str, Callable[[], SystemRunner]]:
    """How each system is started, by its name."""
    size = size_of(options.size)

    def serve() -> SystemRunner:
        log = options.out / "server.log"
        return ServerRunner(options.bundle, options.backend, log, threads=options.threads, fields={})

    def pipeline() -> SystemRunner:
        spec = {
            "kind": "eager",
            "model": str(options.checkpoint),
            "width": size.width,
            "height": size.height,
            "threads": options.threads,
            "guidance": _UNGUIDED,
        }
        return PipelineRunner(sys.executable, spec, options.out / "diffusers.log", variables={})

    return {options.backend: serve} | ({_DIFFUSERS: pipeline} if options.checkpoint else {})


def _draw(name: str, start: Callable[[], SystemRunner], options: PicturesCommand) -> Drawn:
    size = size_of(options.size)
    system, seconds = start(), list[float]()
    try:
        for number in range(options.images):
            out = _picture(options.out, name, number).resolve()
            task = ImageTask(_PROMPT, number, options.steps, (size.width, size.height), _UNGUIDED, out)
            seconds.append(round(system.generate(task), 2))
    finally:
        peak = system.close()
    return Drawn(startup=round(system.startup, 1), seconds=tuple(seconds), peak_memory=peak)


def psnrs(folder: Path, system: str, count: int) -> tuple[float, ...]:
    """Of the pictures of `system` in `folder`, compared with diffusers', in dB."""
    return tuple(
        round(psnr(*(np.asarray(Image.open(_picture(folder, name, number))) for name in (system, _DIFFUSERS))), 1)
        for number in range(count)
    )


def _picture(folder: Path, system: str, number: int) -> Path:
    return folder / f"{system}-{number}.png"


if __name__ == "__main__":
    sys.exit(main())
