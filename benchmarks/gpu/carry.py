"""Carries wheels to a machine that is reached only by commands and small copies.

    python -m benchmarks.gpu.carry check                   there: its Python, and which packages are missing
    python -m benchmarks.gpu.carry pack OUT --python 3.12  here: download, and cut into OUT/01, OUT/02, …
    python -m benchmarks.gpu.carry receive OUT KEPT        there, once for each part: keep it
    python -m benchmarks.gpu.carry install KEPT TARGET     there: join, check, install; then PYTHONPATH=TARGET

Each step may be repeated, and does only what is left. It runs on Python's standard library alone, as nothing else is
there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PART = 29  # MiB: with the working tree of about 32 it has to stay under 64
_INDEX = "index.json"
_BLOCK = 2**20
_ON_THE_IMAGE = (  # what a machine for PyTorch usually has, and the benchmark needs
    "accelerate",
    "cuda-bindings",
    "httpx",
    "huggingface-hub",
    "numpy",
    "onnx",
    "onnxscript",
    "pillow",
    "prometheus-client",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches platforms exactly


class CarryError(Exception):
    """What is wrong and what to do, in a sentence."""


def requirements() -> list[str]:
    """Packages to carry, as `name==version`."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def missing() -> list[str]:
    """What is not installed here, of the packages to carry and of those that should be there."""
    carried = [spec for spec in requirements() if _installed(spec.partition("==")[0]) != spec.partition("==")[2]]
    return [*carried, *(name for name in _ON_THE_IMAGE if _installed(name) is None)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def download(folder: Path, python: str, specs: Sequence[str]) -> list[Path]:
    """Wheels of `specs` for Linux on x86-64 and this version of Python. Raises CarryError."""
    platforms = [f"manylinux_2_{glibc}_x86_64" for glibc in _GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    _run([*command, *(word for name in platforms for word in ("--platform", name)), *specs])
    return sorted(folder.glob("*.whl"))


def cut(wheels: Sequence[Path], out: Path, *, size: int) -> list[Path]:
    """Cut the wheels, one behind the other, into folders of `out` with a part of at most `size` bytes and the index."""
    parts = [part for part, _ in _cuts(wheels, size)]
    names = [f"{number:02}" for number in range(1, len(parts) + 1)]
    index = json.dumps(
        {
            "wheels": [{"name": wheel.name, "size": wheel.stat().st_size, "sha256": sha256(wheel)} for wheel in wheels],
            "parts": [{"name": name, "sha256": part} for name, part in zip(names, parts, strict=True)],
        },
        indent=1,
    )
    shutil.rmtree(out, ignore_errors=True)
    for name, (_, content) in zip(names, _cuts(wheels, size), strict=True):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / f"{name}.part").write_bytes(content)
        (out / name / _INDEX).write_text(index, encoding="utf-8")
    return [out / name for name in names]


def _cuts(wheels: Sequence[Path], size: int) -> Iterator[tuple[str, bytes]]:
    """Each part's hash and content, one at a time in memory."""
    rest = bytearray()
    for wheel in wheels:
        with wheel.open("rb") as file:
            while block := file.read(size - len(rest)):
                rest += block
                if len(rest) == size:
                    yield hashlib.sha256(rest).hexdigest(), bytes(rest)
                    rest.clear()
    if rest:
        yield hashlib.sha256(rest).hexdigest(), bytes(rest)


def receive(source: Path, kept: Path) -> list[str]:
    """Keep the parts that lie in or below `source`; returns the names of those that are still missing.

    Raises:
        CarryError: a part is damaged, or belongs to other wheels than the parts that were kept before.
    """
    kept.mkdir(parents=True, exist_ok=True)
    indexes = sorted(source.rglob(_INDEX))
    if not indexes:
        raise CarryError(f"{source} has no parts: copy one of the folders that `pack` made, such as 01.")
    for index in indexes:
        known = kept / _INDEX
        if known.exists() and known.read_bytes() != index.read_bytes():
            raise CarryError(f"{index.parent} is of other wheels than {kept}: remove {kept} and begin again.")
        shutil.copyfile(index, known)
        for part in index.parent.glob("*.part"):
            _keep(part, kept)
    return _lacking(kept)


def _keep(part: Path, kept: Path) -> None:
    if sha256(part) != _hashes(kept)[part.stem]:
        raise CarryError(f"{part} was damaged on its way: copy it again.")
    shutil.copyfile(part, kept / f"{part.name}.new")
    (kept / f"{part.name}.new").replace(kept / part.name)


def install(kept: Path, target: Path) -> list[str]:
    """Join the parts, check the wheels and install them into `target`; returns their names. Raises CarryError."""
    if lacking := _lacking(kept):
        raise CarryError(f"parts {', '.join(lacking)} are missing: receive them first.")
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        wheels = _join(kept, Path(folder))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        _run([*command, "--no-cache-dir", "--upgrade", "--target", str(target), *map(str, wheels)])
    return [wheel.name for wheel in wheels]


def _join(kept: Path, folder: Path) -> list[Path]:
    blocks = _blocks(kept)
    rest, wheels = b"", []
    for listed in _index(kept)["wheels"]:
        wheel = folder / listed["name"]
        with wheel.open("wb") as file:
            rest = _fill(file, listed["size"], rest, blocks)
        if sha256(wheel) != listed["sha256"]:
            raise CarryError(f"{wheel.name} was damaged on its way: remove {kept} and begin again.")
        wheels.append(wheel)
    return wheels


def _fill(file: BinaryIO, size: int, rest: bytes, blocks: Iterator[bytes]) -> bytes:
    """Write `size` bytes of `rest` and the blocks; returns what is left of the last one."""
    while size > len(rest):
        file.write(rest)
        size -= len(rest)
        rest = next(blocks)
    file.write(rest[:size])
    return rest[size:]


def _blocks(kept: Path) -> Iterator[bytes]:
    for name in _hashes(kept):
        with (kept / f"{name}.part").open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def _index(kept: Path) -> Any:
    """The wheels with name, size and sha256, and the parts with name and sha256."""
    return json.loads((kept / _INDEX).read_text(encoding="utf-8"))


def _hashes(kept: Path) -> dict[str, str]:
    """The hashes of the parts by name."""
    return {part["name"]: part["sha256"] for part in _index(kept)["parts"]}


def _lacking(kept: Path) -> list[str]:
    return [name for name in _hashes(kept) if not (kept / f"{name}.part").exists()]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - pip, of this Python
    if done.returncode:
        raise CarryError(f"pip failed: {done.stderr.strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    words = _parser().parse_args(argv)
    try:
        for line in words.command(words):
            sys.stdout.write(f"{line}\n")
    except CarryError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.carry", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("check", help="tell what is missing here").set_defaults(command=_check)
    pack = commands.add_parser("pack", help="download wheels and cut them into parts")
    pack.add_argument("out", type=Path)
    pack.add_argument("--python", required=True, help="version of the machine's Python, such as 3.12")
    pack.add_argument("--part", type=int, default=PART, help=f"MiB of a part at most; {PART} by default")
    pack.add_argument("--add", action="append", default=[], metavar="NAME==VERSION", help="one more package to carry")
    pack.set_defaults(command=_pack)
    received = commands.add_parser("receive", help="keep the parts of a folder that was copied here")
    received.add_argument("source", type=Path)
    received.add_argument("kept", type=Path, help="folder outside of what the next copy replaces")
    received.set_defaults(command=_receive)
    installed = commands.add_parser("install", help="join the parts and install the wheels")
    installed.add_argument("kept", type=Path)
    installed.add_argument("target", type=Path)
    installed.set_defaults(command=_install)
    return parser


def _check(_words: argparse.Namespace) -> Iterator[str]:
    yield f"Python {platform.python_version()}, {platform.machine()}, {platform.libc_ver()[1]}"
    yield f"missing: {' '.join(missing()) or 'nothing'}"


def _pack(words: argparse.Namespace) -> Iterator[str]:
    wheels = words.out / "wheels"
    folders = cut(
        download(wheels, words.python, [*requirements(), *words.add]), words.out / "parts", size=words.part * 2**20
    )
    for folder in folders:
        yield f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB"


def _receive(words: argparse.Namespace) -> Iterator[str]:
    yield f"missing: {' '.join(receive(words.source, words.kept)) or 'nothing, now install'}"


def _install(words: argparse.Namespace) -> Iterator[str]:
    yield f"installed: {' '.join(install(words.kept, words.target))}"
    yield f"now: export PYTHONPATH={words.target}"


if __name__ == "__main__":
    sys.exit(main())
