"""Build a bundle for the server: a diffusers checkpoint becomes checked ONNX graphs, a tokenizer and a manifest."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engines import checkpoint
from engines.base import BACKENDS, EngineError
from engines.manifest import Defaults, Manifest, Size


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        manifest = _build(arguments, console)
    except EngineError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("cancelled: no bundle was written", style="red")
        return 130
    console.print(_summary(manifest))
    console.print(f"Serve it: python -m server --bundle {arguments.out}", highlight=False, soft_wrap=True)
    return 0


def _build(arguments: argparse.Namespace, console: Console) -> Manifest:
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        stage = progress.add_task(f"finding {arguments.model}", total=None)

        def begin(name: str) -> None:
            nonlocal stage
            progress.update(stage, total=1, completed=1)
            stage = progress.add_task(name, total=None)

        found = checkpoint.find(arguments.model, revision=arguments.revision)
        begin("loading torch")
        from engines.export import export_bundle  # noqa: PLC0415 - seconds of imports, after the cheap refusals

        manifest = export_bundle(
            found,
            arguments.out,
            name=arguments.name,
            backend=arguments.backend,
            precision=arguments.precision,
            resolutions=arguments.resolution,
            rows=arguments.rows,
            defaults=Defaults(
                scheduler=found.scheduler, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance
            ),
            examples=arguments.example,
            progress=begin,
        )
        progress.update(stage, total=1, completed=1)
    return manifest


def _summary(manifest: Manifest) -> Table:
    table = Table(title=f"{manifest.name}: {manifest.precision} for {manifest.backend}", title_justify="left")
    table.add_column("file")
    table.add_column("MB", justify="right")
    table.add_column("sha256")
    for file in manifest.files:
        table.add_row(file.path, f"{file.size / 1e6:.1f}", file.sha256[:12])
    sizes = ", ".join(map(str, manifest.resolutions))
    table.caption = f"resolutions {sizes}; row buckets {', '.join(map(str, manifest.rows))}"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build_engines.py", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="a diffusers folder, or a hub id such as OFA-Sys/small-stable-diffusion-v0",
    )
    add("--revision", help="the hub revision (branch, tag or commit) to download")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder the bundle is written to")
    add("--name", help="what the server calls the model (default: the checkpoint's name)")
    add("--backend", choices=BACKENDS, default="onnxruntime", help="what will run the graphs")
    add(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="how weights are stored: fp16 halves the bundle; the backend computes in what it does best",
    )
    add(
        "--resolution",
        type=_size,
        nargs="+",
        action="extend",
        default=[],
        metavar="WxH",
        help="a picture size to serve, repeatable; the first is the default (default: the checkpoint's own)",
    )
    add(
        "--rows",
        type=_rows,
        default=(2, 4, 8, 16),
        metavar="N,N",
        help="row buckets; the largest bounds a step: a guided image takes two rows (default: 2,4,8,16)",
    )
    add("--steps", type=int, default=50, help="steps of a request that names none (default: 50)")
    add("--guidance", type=float, default=7.5, help="guidance scale of a request that names none (default: 7.5)")
    add(
        "--example",
        action="append",
        default=[],
        metavar="PROMPT",
        help="a prompt that shows what the model can do, repeatable",
    )
    return parser


def _size(text: str) -> Size:
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)) or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write WIDTHxHEIGHT, such as 512x512")
    return Size(width=int(match[1]), height=int(match[2]))


def _rows(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of row counts: write 2,4,8,16")
    return tuple(sorted({int(part) for part in text.split(",")}))


if __name__ == "__main__":
    sys.exit(main())
