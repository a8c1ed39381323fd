"""Build a bundle for the server: a Stable Diffusion checkpoint becomes checked ONNX graphs and compiled engines.

build_engines.py --model M --out DIR          export and compile, on one machine
build_engines.py export --model M --out DIR   checkpoint to ONNX: needs torch and no GPU
build_engines.py compile DIR                  ONNX to engines: needs no torch, and for TensorRT the GPU itself
build_engines.py verify DIR                   compare engines with the FP32 graphs, where they run
build_engines.py inspect DIR                  show what a bundle holds
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from engines.backends.available import check_fits, choose, unavailable_reason
from engines.backends.registry import BACKENDS, ON_CPU
from engines.build.bundle import BundleSpec, export, geometry_of, reshaped, stored, with_whole_builds
from engines.build.compile import compile_backend, precisions, prefers_bf16, typed_graphs
from engines.build.console import (
    BuildFeed,
    BuildLog,
    BuildProgress,
    inspect_tables,
    plan_table,
    progress_on,
    summary_table,
    terminal,
)
from engines.build.verify import VerificationError, verify
from engines.checkpoints.checkpoint import Checkpoint, count_parameters
from engines.checkpoints.embedding import Embedding
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.lora import Lora
from engines.errors import EngineError
from engines.manifest import Manifest, Size

_ROWS = (2, 4, 8, 16)
BuildShow = BuildProgress | BuildLog | BuildFeed
Command = Callable[[argparse.Namespace, BuildShow, Console], None]


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    word = words.pop(0) if words and words[0] in COMMANDS else "build"
    parser, command = COMMANDS[word]
    arguments = parser(word).parse_args(words)
    console = terminal()
    try:
        with _progress(arguments, console) as progress:
            command(arguments, progress, console)
    except EngineError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except OSError as error:
        remedy = "make room, or choose another --out" if error.errno == errno.ENOSPC else "see that it can be written"
        console.print(f"[bold red]error:[/] {escape(str(error))}: {remedy}.", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("cancelled: what was finished is kept, nothing is half written", style="red")
        return 130
    return 0


def _progress(arguments: argparse.Namespace, console: Console) -> BuildShow:
    if getattr(arguments, "progress", None) != "json":
        return progress_on(console)
    _end_with_standard_input()
    return BuildFeed(sys.stdout)


def _end_with_standard_input() -> None:
    """Cancel, as Ctrl-C does, once the program that started this one closes our standard input, or is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background is started to ignore it
    threading.Thread(target=watch, daemon=True).start()


def _build(arguments: argparse.Namespace, progress: BuildShow, console: Console) -> None:
    arguments.backend = _backends(arguments, progress)
    arguments.bundle = arguments.out
    checkpoint = _find(arguments, progress)
    wanted = _wanted(arguments, checkpoint)
    for backend in arguments.backend:
        chosen = precisions(backend, arguments.precision, prefers_bf16=checkpoint.config.prefers_bf16)
        console.print(plan_table(backend, geometry_of(checkpoint, wanted), chosen, count_parameters(checkpoint)))
    manifest = export(checkpoint, arguments.out, wanted, force=arguments.force, progress=progress)
    _compile_each(manifest, arguments, progress, console)


def _export(arguments: argparse.Namespace, progress: BuildShow, _console: Console) -> None:
    checkpoint = _find(arguments, progress)
    export(checkpoint, arguments.out, _wanted(arguments, checkpoint), force=arguments.force, progress=progress)


def _find(arguments: argparse.Namespace, progress: BuildShow) -> Checkpoint:
    return find_checkpoint(
        arguments.model,
        revision=arguments.revision,
        config=arguments.config,
        allow_pickle=arguments.allow_pickle,
        loras=tuple(arguments.lora),
        embeddings=tuple(arguments.embedding),
        decoder=arguments.decoder,
        progress=progress,
    )


def _wanted(arguments: argparse.Namespace, checkpoint: Checkpoint) -> BundleSpec:
    backends = arguments.backend or ["tensorrt"]
    bf16 = checkpoint.config.prefers_bf16
    typed = (typed_graphs(backend, arguments.precision, prefers_bf16=bf16) for backend in backends)
    halved = not set(backends) & set(ON_CPU) and arguments.precision != "fp32"
    return BundleSpec(
        weights=arguments.weights or stored(arguments.out) or ("fp16" if halved else "fp32"),
        typed=tuple(sorted(set().union(*typed))),
        name=arguments.name,
        resolutions=tuple(arguments.resolution),
        rows=arguments.rows,
        decode_batch=arguments.decode_batch,
        steps=arguments.steps,
        guidance=arguments.guidance,
        examples=tuple(arguments.example),
    )


def _compile(arguments: argparse.Namespace, progress: BuildShow, console: Console) -> None:
    arguments.backend = _backends(arguments, progress)
    manifest = with_whole_builds(arguments.bundle)
    asked = {"resolutions": arguments.resolution, "rows": arguments.rows, "decode_batch": arguments.decode_batch}
    manifest = reshaped(manifest, **{fact: tuple(v) if isinstance(v, list) else v for fact, v in asked.items() if v})
    for backend in arguments.backend:
        chosen = precisions(backend, arguments.precision, prefers_bf16=prefers_bf16(manifest))
        console.print(plan_table(backend, manifest, chosen, manifest.parameters))
    _compile_each(manifest, arguments, progress, console)


def _compile_each(manifest: Manifest, arguments: argparse.Namespace, progress: BuildShow, console: Console) -> None:
    for backend in arguments.backend:
        manifest = _compile_one(manifest, backend, arguments, progress, console)
    console.print(f"Serve it: python -m server --bundle {arguments.bundle}", highlight=False, soft_wrap=True)


def _compile_one(
    manifest: Manifest, backend: str, arguments: argparse.Namespace, progress: BuildShow, console: Console
) -> Manifest:
    bundle = arguments.bundle
    build = compile_backend(
        manifest,
        bundle,
        backend,
        precision=arguments.precision,
        force=arguments.force,
        progress=progress,
    )
    manifest = reshaped(manifest, builds={**manifest.builds, backend: build})
    manifest.save(bundle)
    if arguments.verify and not build.verification:
        manifest = _verified(manifest, bundle, backend, progress)
    console.print(summary_table(manifest, backend))
    return manifest


def _verify(arguments: argparse.Namespace, progress: BuildShow, console: Console) -> None:
    manifest = Manifest.load(arguments.bundle)
    for backend in arguments.backend or manifest.builds:
        if backend not in manifest.builds:
            raise EngineError(f"{arguments.bundle} holds no engines for {backend}: compile them first.")
        if arguments.backend and (reason := unavailable_reason(backend)):
            raise EngineError(f"{backend} cannot be verified here: {reason}.")
        manifest = _verified(manifest, arguments.bundle, backend, progress)
        console.print(summary_table(manifest, backend))


def _verified(manifest: Manifest, bundle: Path, backend: str, progress: BuildShow) -> Manifest:
    if reason := unavailable_reason(backend):
        progress.note(f"{backend}: not yet verified, since it cannot run here ({reason})")
        return manifest
    check_fits(manifest, backend, bundle)
    try:
        build = verify(manifest, bundle, backend, progress=progress)
    except VerificationError:
        others = {name: build for name, build in manifest.builds.items() if name != backend}
        reshaped(manifest, builds=others).save(bundle)  # nobody shall serve what is known to be wrong
        raise
    manifest = reshaped(manifest, builds={**manifest.builds, backend: build})
    manifest.save(bundle)
    return manifest


def _inspect(arguments: argparse.Namespace, _progress: BuildShow, console: Console) -> None:
    console.print(inspect_tables(Manifest.load(arguments.bundle)))


def _backends(arguments: argparse.Namespace, progress: BuildShow) -> list[str]:
    """The backends asked for, in order, each once; `auto` is the best that runs here."""
    asked: list[str] = []
    for backend in arguments.backend or ["auto"]:
        if backend == "auto":
            choice = choose()
            progress.note(f"backend {choice.backend} ({choice.reason})")
            asked.append(choice.backend)
        else:
            asked.append(backend)
    return list(dict.fromkeys(asked))


def _build_parser(word: str) -> argparse.ArgumentParser:
    parser = _parser(word)
    _add_source(parser)
    _add_shapes(parser, rows=_ROWS, decode_batch=1)
    _add_compile(parser)
    return parser


def _export_parser(word: str) -> argparse.ArgumentParser:
    parser = _parser(word)
    _add_source(parser)
    _add_shapes(parser, rows=_ROWS, decode_batch=1)
    _add_backend(parser, "what the graphs are for, repeatable (default: tensorrt)", BACKENDS)
    _add_precision(parser)
    return parser


def _compile_parser(word: str) -> argparse.ArgumentParser:
    parser = _parser(word)
    _add_bundle(parser)
    _add_shapes(parser, rows=None, decode_batch=None)
    _add_compile(parser)
    parser.add_argument(
        "--progress",
        choices=("people", "json"),
        default="people",
        help="json is for a program that starts this one: lines on standard output, and the end when its input ends",
    )
    return parser


def _verify_parser(word: str) -> argparse.ArgumentParser:
    parser = _parser(word)
    _add_bundle(parser)
    _add_backend(parser, "whose engines, repeatable (default: all that run here)", BACKENDS)
    return parser


def _inspect_parser(word: str) -> argparse.ArgumentParser:
    parser = _parser(word)
    _add_bundle(parser)
    return parser


def _parser(word: str) -> argparse.ArgumentParser:
    name = "build_engines.py" if word == "build" else f"build_engines.py {word}"
    return argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the checkpoint")
    add = group.add_argument
    add(
        "--model",
        required=True,
        metavar="M",
        help="a diffusers folder, a .safetensors file, or a hub id such as OFA-Sys/small-stable-diffusion-v0 "
        "(a private one's token is read from HF_TOKEN)",
    )
    add("--revision", help="the hub revision (branch, tag or commit) to download")
    add("--config", metavar="DIR", help="for a single file: a diffusers folder or hub id whose configs describe it")
    add("--lora", type=_lora, action="append", default=[], metavar="FILE[:SCALE]", help="fused in, repeatable")
    add(
        "--embedding",
        type=_embedding,
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="words learned by textual inversion, repeatable",
    )
    add(
        "--decoder",
        metavar="D",
        help="a folder or hub id of a distilled decoder (AutoencoderTiny) such as madebyollin/taesd, which decodes in "
        "place of the VAE: many times faster, and nearly the same pictures",
    )
    add("--allow-pickle", action="store_true", help="read pickled weights (.bin, .ckpt), which can run code")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder the bundle is written to")
    add("--name", help="what the server calls the model (default: the checkpoint's name)")
    add("--steps", type=int, help="steps of a request that names none (default: 50; 4 for latent consistency models)")
    add("--guidance", type=float, help="guidance scale of a request that names none (default: 7.5; 8.5 for those)")
    add(
        "--example",
        action="append",
        default=[],
        metavar="PROMPT",
        help="a prompt that shows what the model can do, repeatable",
    )
    add(
        "--weights",
        choices=("fp32", "fp16"),
        help="how weights are stored, once for all backends (default: as they are in DIR; "
        "in a new one fp16 for GPUs alone, otherwise fp32)",
    )


def _add_shapes(parser: argparse.ArgumentParser, *, rows: tuple[int, ...] | None, decode_batch: int | None) -> None:
    group = parser.add_argument_group("shapes")
    default = "default: %(default)s" if rows else "default: as the bundle says"
    group.add_argument(
        "--resolution",
        type=_size,
        nargs="+",
        action="extend",
        default=[],
        metavar="WxH",
        help="a picture size to serve, repeatable; the first is what a request gets that names none "
        "(default: the model's own)",
    )
    group.add_argument(
        "--rows",
        type=_rows,
        default=rows,
        metavar="N,N",
        help="row buckets; the largest bounds a step: a guided image takes two rows "
        + ("(default: 2,4,8,16)" if rows else f"({default})"),
    )
    group.add_argument(
        "--decode-batch",
        type=_count,
        default=decode_batch,
        metavar="N",
        help=f"decode up to N pictures in one call; each costs memory ({default})",
    )


def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_backend(
        parser, "what will run the graphs, repeatable; auto takes the best that runs here", ("auto", *BACKENDS)
    )
    _add_precision(parser)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the engines with the FP32 graphs, where they run (default: yes)",
    )


def _add_backend(parser: argparse.ArgumentParser, text: str, choices: Sequence[str]) -> None:
    parser.add_argument("--backend", action="append", choices=choices, help=text)


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="what the engines compute in (default: fp16 on GPUs, bf16 for SD 2.x there, fp32 on CPUs; "
        "openvino has bf16 and int8 too)",
    )
    parser.add_argument("--force", action="store_true", help="do everything anew")


def _size(text: str) -> Size:
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)) or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write WIDTHxHEIGHT, such as 512x512")
    return Size(width=int(match[1]), height=int(match[2]))


def _rows(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of row counts: write 2,4,8,16")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write 1 to 99")
    return int(text)


def _lora(text: str) -> Lora:
    try:
        return Lora.parse(text)
    except EngineError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _embedding(text: str) -> Embedding:
    try:
        return Embedding.parse(text)
    except EngineError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


COMMANDS: dict[str, tuple[Callable[[str], argparse.ArgumentParser], Command]] = {
    "build": (_build_parser, _build),
    "export": (_export_parser, _export),
    "compile": (_compile_parser, _compile),
    "verify": (_verify_parser, _verify),
    "inspect": (_inspect_parser, _inspect),
}

if __name__ == "__main__":
    sys.exit(main())
