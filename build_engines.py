"""Build a bundle for the server: a Stable Diffusion checkpoint becomes checked ONNX graphs and compiled engines.

build_engines.py --model M --out DIR          export and compile, on one machine
build_engines.py export --model M --out DIR   checkpoint to ONNX: needs torch and no GPU
build_engines.py compile DIR                  ONNX to engines: needs no torch, and for TensorRT the GPU itself
build_engines.py verify DIR                   compare engines with the FP32 graphs, where they run
build_engines.py inspect DIR                  show what a bundle holds

This is the command line of `engines.build.api`. Each command takes --help.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console
from rich.markup import escape

from engines.build import api
from engines.build.console import Display, JsonDisplay, display_on, terminal
from engines.build.request_defaults.flags import RequestFlags
from engines.build.tables import findings_tables, inspect_tables, plan_table, serve_command, summary_table
from engines.build.values import (
    AUTO_OR_BACKEND,
    ONE_OF_BACKENDS,
    Backend,
    BackendOrAuto,
    Count,
    LoraCount,
    Name,
    OptimizationLevel,
    Resolution,
    RowBuckets,
    Variant,
    parsed_by,
)
from engines.cli import CommandLine, Metavar, Repeatable, RepeatableList, parse, split_command
from engines.errors import EngineError
from engines.manifest import Manifest, Precision, Storage

_PROGRAM = "build_engines.py"
_ROWS_HELP = "row buckets; the largest bounds a step: a guided image takes two rows"


def main(argv: Sequence[str] | None = None) -> int:
    name, words = split_command(sys.argv[1:] if argv is None else argv, tuple(COMMANDS), default="build")
    command = parse(COMMANDS[name], words, prog=_PROGRAM if name == "build" else f"{_PROGRAM} {name}")
    console = terminal()
    try:
        with command.display(console) as display:
            command.run(display, console)
    except EngineError as error:
        return _failed(console, str(error))
    except OSError as error:
        remedy = "make room, or choose another --out" if error.errno == errno.ENOSPC else "see that it can be written"
        return _failed(console, f"{error}: {remedy}.")
    except KeyboardInterrupt:
        console.print("cancelled: what was finished is kept, nothing is half written", style="red")
        return 130
    return 0


def _failed(console: Console, message: str) -> int:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return 1


# Flags


class _Command(CommandLine, ABC):
    """What every command does."""

    def display(self, console: Console) -> Display:
        return display_on(console)

    @abstractmethod
    def run(self, display: Display, console: Console) -> None:
        """Do the work. Raises EngineError, OSError."""


class _BundleFlags(CommandLine):
    bundle: Annotated[CliPositionalArg[Path], Metavar("BUNDLE")] = Field(description="the bundle's folder")


class _SourceFlags(CommandLine):
    """The checkpoint, and the bundle that is exported from it."""

    model: Annotated[str, Metavar("M")] = Field(
        description="a diffusers folder, a .safetensors file, or a hub id such as OFA-Sys/small-stable-diffusion-v0 "
        "(the token for private ones is read from HF_TOKEN)",
    )
    out: Annotated[Path, Metavar("DIR")] = Field(description="the folder the bundle is written to")
    revision: str | None = Field(None, description="the hub revision (branch, tag or commit) to download")
    config: Annotated[str | None, Metavar("DIR")] = Field(
        None, description="for a single file: a diffusers folder or hub id whose configs describe it"
    )
    lora: Annotated[Repeatable[Annotated[api.Lora, parsed_by(api.Lora.parse)]], Metavar("FILE[:SCALE]")] = Field(
        (), description="a LoRA to fuse into the weights, repeatable"
    )
    embedding: Annotated[
        Repeatable[Annotated[api.Embedding, parsed_by(api.Embedding.parse)]], Metavar("FILE[:TOKEN]")
    ] = Field((), description="a textual inversion whose tokens are added, repeatable")
    decoder: Annotated[str | None, Metavar("D")] = Field(
        None,
        description="a folder or hub id of a distilled decoder (AutoencoderTiny) such as madebyollin/taesd, beside "
        "the VAE: requests choose it with decoder fast; many times faster, and nearly the same images",
    )
    allow_pickle: CliToggleFlag[bool] = Field(
        False, description="read pickled weights (.bin, .ckpt), which can run code"
    )
    safety_checker: bool = Field(
        True, description="build the safety checker of a diffusers folder too, where it has one"
    )
    vae: Annotated[str | None, Metavar("V")] = Field(
        None, description="a VAE that replaces the checkpoint's own: a .safetensors file, or a diffusers folder"
    )
    variant: Annotated[Variant | None, Metavar("VARIANT")] = Field(
        None,
        description="which weights of a folder or hub id to read, where it has several, such as fp16 or non_ema "
        "(default: those without a variant in their names)",
    )
    name: Name | None = Field(None, description="the model's name in the API (default: the checkpoint's name)")
    weights: Storage | None = Field(
        None,
        description="how weights are stored, once for all backends (default: as they are in DIR; "
        "in a new one fp16 for GPUs alone, otherwise fp32)",
    )

    def source(self) -> api.CheckpointSource:
        return api.CheckpointSource(
            self.model,
            revision=self.revision,
            config=self.config,
            loras=self.lora,
            embeddings=self.embedding,
            decoder=self.decoder,
            vae=self.vae,
            allow_pickle=self.allow_pickle,
            variant=self.variant,
            safety_checker=self.safety_checker,
        )


class _ResolutionFlag(CommandLine):
    resolution: Annotated[RepeatableList[Resolution], Metavar("WxH")] = Field(
        (),
        description="an image size to serve, repeatable; the first is the default of requests "
        "(default: the model's own)",
    )


class _ExportFlags(_ResolutionFlag, RequestFlags, _SourceFlags):
    rows: RowBuckets = Field((), description=f"{_ROWS_HELP} (default: {','.join(map(str, api.DEFAULT_ROWS))})")
    decode_batch: Count = Field(1, description="decode up to N images in one call; each takes memory")
    lora_slots: Annotated[LoraCount, Metavar("N")] = Field(
        0,
        ge=0,
        description="let each request choose LoRAs of its own, of which the device holds N (default: 0, none); "
        "graphs that apply them are built too",
    )
    lora_rank: Annotated[LoraCount, Metavar("N")] = Field(
        64, ge=1, description="the largest rank of such a LoRA; LoRAs of lower ranks take less of the device's memory"
    )

    def options(self) -> api.ExportOptions:
        capacity = api.LoraCapacity(slots=self.lora_slots, rank=self.lora_rank) if self.lora_slots else None
        return api.ExportOptions(
            weights=self.weights,
            rows=self.rows or api.DEFAULT_ROWS,
            decode_batch=self.decode_batch,
            lora=capacity,
            name=self.name,
            resolutions=self.resolution,
            **self.of_requests(),
        )


class _PrecisionFlags(CommandLine):
    precision: Precision | None = Field(
        None,
        description="what the engines compute in (default: fp16 on GPUs, bf16 for SD 2.x there, fp32 on CPUs; "
        "openvino has bf16 and int8 too, tensorrt and tensorrt_rtx fp8 and int8 for the UNet)",
    )
    force: CliToggleFlag[bool] = Field(False, description="build again what is there already")


class _CompileFlags(_PrecisionFlags):
    backend: Annotated[Repeatable[BackendOrAuto], AUTO_OR_BACKEND] = Field(
        (), description="what will run the graphs, repeatable; auto takes the best that runs here (default: auto)"
    )
    optimization_level: Annotated[OptimizationLevel | None, Metavar("{0..5}")] = Field(
        None,
        description="how long TensorRT searches for fast kernels; 5 takes several times as long as 3, and tiles across "
        "kernels too (default: 3; for --backend tensorrt alone)",
    )
    verify: bool = Field(True, description="compare the engines with the FP32 graphs, where they run")

    def backends(self) -> Sequence[str]:
        return self.backend or (api.AUTO,)


# Commands


class BuildCommand(_Command, _CompileFlags, _ExportFlags):
    __doc__ = __doc__  # the module's, which lists the commands

    def run(self, display: Display, console: Console) -> None:
        report = _Report(display, console)
        api.build(
            self.source(),
            self.out,
            backends=self.backends(),
            precision=self.precision,
            optimization_level=self.optimization_level,
            options=self.options(),
            verify=self.verify,
            force=self.force,
            reporter=report.reporter,
        )
        report.print(self.out)


class ExportCommand(_Command, _PrecisionFlags, _ExportFlags):
    """Export a checkpoint to ONNX graphs; needs torch and no GPU."""

    backend: Annotated[Repeatable[Backend], ONE_OF_BACKENDS] = Field(
        (), description="what the graphs are for, repeatable (default: tensorrt)"
    )

    def run(self, display: Display, console: Console) -> None:
        report = _Report(display, console)
        api.export(
            self.source(),
            self.out,
            backends=self.backend or ("tensorrt",),
            precision=self.precision,
            options=self.options(),
            force=self.force,
            reporter=report.reporter,
        )
        report.print()


class CompileCommand(_Command, _CompileFlags, _ResolutionFlag, _BundleFlags):
    """Compile engines from the ONNX graphs of a bundle; needs no torch, and for TensorRT the GPU itself."""

    rows: RowBuckets = Field((), description=f"{_ROWS_HELP} (default: the bundle's)")
    decode_batch: Annotated[Count | None, Metavar("N")] = Field(
        None, description="decode up to N images in one call; each takes memory (default: the bundle's)"
    )
    lora_slots: Annotated[LoraCount | None, Metavar("N")] = Field(
        None, ge=1, description="how many LoRAs of requests the device holds (default: the bundle's)"
    )
    lora_rank: Annotated[LoraCount | None, Metavar("N")] = Field(
        None, ge=1, description="the largest rank of such a LoRA (default: the bundle's)"
    )
    progress: Literal["people", "json"] = Field(
        "people",
        description="json is for a program that starts this one: progress on standard output in JSON lines; the build "
        "is cancelled when standard input is closed",
    )

    def display(self, console: Console) -> Display:
        if self.progress != "json":
            return super().display(console)
        _cancel_with_standard_input()
        return JsonDisplay(sys.stdout)

    def run(self, display: Display, console: Console) -> None:
        report = _Report(display, console)
        api.compile(
            self.bundle,
            backends=self.backends(),
            precision=self.precision,
            optimization_level=self.optimization_level,
            shapes=api.ShapeOptions(
                resolutions=self.resolution,
                rows=self.rows,
                decode_batch=self.decode_batch,
                lora_slots=self.lora_slots,
                lora_rank=self.lora_rank,
            ),
            verify=self.verify,
            force=self.force,
            reporter=report.reporter,
        )
        report.print(self.bundle)


class VerifyCommand(_Command, _BundleFlags):
    """Compare the engines of a bundle with its FP32 graphs, where they run."""

    backend: Annotated[Repeatable[Backend], ONE_OF_BACKENDS] = Field(
        (), description="whose engines, repeatable (default: all that run here)"
    )
    bisect: CliToggleFlag[bool] = Field(
        False,
        description="find the first layer that strays from FP32, and leave the bundle as it is; takes several builds",
    )

    def run(self, display: Display, console: Console) -> None:
        report = _Report(display, console)
        if self.bisect:
            found = api.bisect(self.bundle, backends=self.backend, reporter=report.reporter)
            console.print(findings_tables(found))
            return
        api.verify(self.bundle, backends=self.backend, reporter=report.reporter)
        report.print()


class InspectCommand(_Command, _BundleFlags):
    """Show the properties, graphs and engines of a bundle."""

    def run(self, display: Display, console: Console) -> None:  # noqa: ARG002 - as every command
        console.print(inspect_tables(api.inspect(self.bundle)))


COMMANDS: dict[str, type[_Command]] = {
    "build": BuildCommand,
    "export": ExportCommand,
    "compile": CompileCommand,
    "verify": VerifyCommand,
    "inspect": InspectCommand,
}


class _Report:
    """What a build reports. Results are kept and printed once it has ended, so that they are what a terminal shows."""

    def __init__(self, display: Display, console: Console) -> None:
        self._console = console
        self._built: list[tuple[Manifest, str]] = []
        self._not_followed: list[str] = []
        self.reporter = api.Reporter(
            progress=display,
            on_plan=lambda plan: console.print(plan_table(plan)),
            on_built=lambda manifest, backend: self._built.append((manifest, backend)),
            on_not_followed=self._not_followed.extend,
        )

    def print(self, bundle: Path | None = None) -> None:
        """Print the results, and the command that serves `bundle` as the last line."""
        for manifest, backend in self._built:
            self._console.print(summary_table(manifest, backend))
        for line in self._not_followed:
            self._print_line(f"warning: {line}")
        if bundle:
            self._print_line(f"Serve it: {serve_command(bundle)}")

    def _print_line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _cancel_with_standard_input() -> None:
    """Cancel, as Ctrl-C does, once the program that started this one closes our standard input, or has ended."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process is started with SIGINT ignored
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
