"""Builds an image of the Dockerfile stage by stage, and holds the container to what docs/deployment.md promises.

scripts/check-image                        the image for CPUs, with Docker or else Podman
scripts/check-image cuda                   the one for GPUs, which serves its demo on the CPU where there is no GPU
scripts/check-image --stand-in base        where no registry of images is reached: Debian's packages, by debootstrap
scripts/check-image --stand-in tensorrt    where NVIDIA's package index is not reached: TensorRT for RTX, from PyPI
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import dockerfile

from tests import ROOT

# Lent to a build that has a stand-in for its base, which knows neither this network's certificates nor its mirrors.
LENT = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
LEFT = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "bundles", "demo-checkpoint", "demo-state")
HARDENED = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all")  # noqa: S108 - the container's
JUDGE = ("python", "-m", "engines.demo.check", "--url", "http://127.0.0.1:8000", "--prompts", "40")
COMPILE = ("python", "-m", "build_engines", "compile", "/bundles/demo", "--backend", "tensorrt_rtx")
COMPILERS = ("cc", "gcc", "g++", "clang", "nvcc", "ld")
STOP_SECONDS = 10  # Docker's own patience


class CheckFailed(Exception):
    """The image is not what it should be."""


@dataclass(frozen=True)
class Stage:
    """One `FROM … AS name` of the Dockerfile."""

    name: str
    base: str
    commands: list[dockerfile.Command] = field(default_factory=list)

    @property
    def needs(self) -> set[str]:
        """What it is made of: its base, and what it copies from."""
        copied = (flag for command in self.commands if command.cmd == "COPY" for flag in command.flags)
        return {self.base, *(flag.removeprefix("--from=") for flag in copied if flag.startswith("--from="))}


def stages(path: Path) -> dict[str, Stage]:
    """The stages of a Dockerfile in its order, as BuildKit's own parser reads them."""
    found: list[Stage] = []
    for command in dockerfile.parse_file(str(path)):
        if command.cmd == "FROM":
            base, _, name = command.value
            found.append(Stage(name, base))
        else:
            found[-1].commands.append(command)
    return {stage.name: stage for stage in found}


def needed(everything: dict[str, Stage], target: str) -> dict[str, Stage]:
    """`target` and the stages it is made of, in their order."""
    wanted, todo = set[str](), [target]
    while todo:
        name = todo.pop()
        if name in everything and name not in wanted:
            wanted.add(name)
            todo.extend(everything[name].needs)
    return {name: stage for name, stage in everything.items() if name in wanted}


def text_of(parts: dict[str, Stage]) -> str:
    """A Dockerfile of these stages alone: older Podman builds all that come before the target, needed or not."""
    lines: list[str] = []
    for stage in parts.values():
        lines.append(f"FROM {stage.base} AS {stage.name}")
        lines += [command.original for command in stage.commands]
    return "\n".join(lines) + "\n"


def run(*command: str) -> str:
    """What `command` prints. Raises CheckFailed with its last lines where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise CheckFailed(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


def works(engine: str) -> bool:
    """Whether it is installed, and its daemon runs if it has one."""
    with suppress(CheckFailed, FileNotFoundError):
        return bool(run(engine, "info"))
    return False


class Engine:
    """Docker, or Podman with what it needs where there is no systemd and limits cannot be raised."""

    def __init__(self) -> None:
        self.name = next((name for name in ("docker", "podman") if works(name)), "")
        if not self.name:
            raise CheckFailed("Neither docker nor podman works here: apt-get install podman runc needs no daemon.")
        self._general: list[str] = []
        self._running: list[str] = []
        self._building: list[str] = []
        if self.name == "podman":
            self._building = ["--format", "docker", "--layers", "--pull=missing"]  # OCI's format has no HEALTHCHECK
            files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
            self._running = ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={min(processes, 32768)}"]
            if not Path("/run/systemd/system").exists():
                self._general = ["--cgroup-manager", "cgroupfs"]
                self._general += ["--runtime", "runc"] if shutil.which("runc") else []
                self._building += ["--isolation", "chroot", "--network", "host"]

    def __call__(self, *arguments: str) -> str:
        return run(self.name, *self._general, *arguments)

    def build(self, context: Path, stage: str, tag: str, *, lent: bool) -> None:
        volumes = [f"--volume={path}:{path}:ro" for path in LENT if lent and Path(path).exists()]
        self("build", *self._building, *volumes, "--target", stage, "--tag", tag, str(context))

    def once(self, image: str, *command: str) -> str:
        """The output of a command in a container of its own."""
        return self("run", "--rm", *self._running, "--network", "none", "--entrypoint", command[0], image, *command[1:])

    def has(self, image: str) -> bool:
        with suppress(CheckFailed):
            return bool(self("image", "inspect", image))
        return False

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name))[0]

    @contextmanager
    def container(self, image: str, *options: str) -> Iterator[Container]:
        name = f"latentd-check-{uuid.uuid4().hex[:8]}"
        self("run", "--detach", "--name", name, *self._running, *HARDENED, *options, image)
        try:
            yield Container(self, name)
        except CheckFailed as error:
            raise CheckFailed(f"{error}\n{self('logs', name)}") from error
        finally:
            self("rm", "--force", "--volumes", name)


@dataclass(frozen=True)
class Container:
    """A running one."""

    engine: Engine
    name: str

    def do(self, *command: str) -> str:
        return self.engine("exec", self.name, *command)

    def is_ready(self) -> bool:
        code = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready')"
        try:
            self.do("python", "-c", code)
        except CheckFailed:
            return False
        return True


def bootstrap(engine: Engine, image: str, release: str) -> None:
    """Make `image` of Debian's packages, with Debian's Python where the official images have theirs."""
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    with tempfile.TemporaryDirectory() as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        run("debootstrap", "--variant=minbase", f"--include={packages}", release, str(root))
        shutil.rmtree(root / "var/cache/apt")
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):  # the image's Python is nobody else's
            marker.unlink()
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        run("tar", "--create", "--directory", str(root), "--file", str(archive), ".")
        engine("import", str(archive), image)


def with_stand_in(engine: Engine, parts: dict[str, Stage]) -> dict[str, Stage]:
    """`parts` over an image of Debian's packages, of the release that the base's tag ends with."""
    base = parts["base"]
    release = base.base.rpartition("-")[2]
    image = f"localhost/latentd-check:debian-{release}"
    seconds = 0.0 if engine.has(image) else timed(lambda: bootstrap(engine, image, release))
    say(f"{base.base} is stood in for by Debian's packages (made in {seconds:.1f} s)")
    return {**parts, "base": replace(base, base=image)}


@contextmanager
def context_of(parts: dict[str, Stage], *, without_tensorrt: bool) -> Iterator[Path]:
    """This repository as a context to build from, its Dockerfile of `parts` alone."""
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder) / "latentd"
        shutil.copytree(ROOT, context, ignore=LEFT)
        (context / "Dockerfile").write_text(text_of(parts), encoding="utf-8")
        if without_tensorrt:
            project = context / "pyproject.toml"
            text, found = re.subn(r'"tensorrt>=[^"]*"', '"tensorrt-rtx>=1.7"', project.read_text(encoding="utf-8"))
            require(found, "the requirement tensorrt is stood in for by tensorrt-rtx")
            project.write_text(text, encoding="utf-8")
        yield context


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def row(*cells: object) -> None:
    say(f"| {' | '.join(map(str, cells))} |")


def timed(what: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.monotonic()
    what()
    return time.monotonic() - began


def build(engine: Engine, context: Path, parts: dict[str, Stage], *, lent: bool) -> str:
    """Build each stage, print the table, and return the last one's image."""
    row("stage", "seconds", "MB", "packages")
    row("---", "---:", "---:", "---:")
    tag = ""
    for name in parts:
        tag = f"localhost/latentd-check:{name}"
        seconds = timed(partial(engine.build, context, name, tag, lent=lent))
        count = "import importlib.metadata as m; print(len({one.name for one in m.distributions(path=['%s'])}))"
        site = engine.once(tag, "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        packages = engine.once(tag, "python", "-c", count % site).strip()
        row(name, f"{seconds:.1f}", f"{engine.inspect(tag)['Size'] / 1e6:.0f}", packages)
    return tag


def require(condition: object, what: str) -> None:
    if not condition:
        raise CheckFailed(what)
    say(f"ok: {what}")


def look(engine: Engine, image: str) -> list[str]:
    """Check what lies in the image and how it is set up. Returns its health check."""
    inspected = engine.inspect(image)
    config = inspected["Config"]
    uid = engine.once(image, "id", "-u").strip()
    require(uid == config["User"].partition(":")[0] == "10001", f"the user is {uid}, not root")
    require(config["Entrypoint"] == ["latentd"], "the entry point is latentd itself, which hears signals")
    require(config.get("StopSignal", "SIGTERM") in {"SIGTERM", "15"}, "it is stopped by SIGTERM")
    for module in ("torch", "onnx", "diffusers", "transformers"):
        find = f"import sys; from importlib.util import find_spec; sys.exit(find_spec('{module}') is not None)"
        engine.once(image, "python", "-c", find)
    require(True, "no torch, no onnx, no diffusers, no transformers")
    found = engine.once(image, "sh", "-c", f"for one in {' '.join(COMPILERS)}; do command -v $one || true; done")
    require(not found.strip(), "no compiler")
    engine.once(image, "sh", "-c", 'test -z "$(find /opt/latentd -writable -not -type l | head -1)"')
    require(True, "the code cannot be changed by its user")
    engine.once(image, "python", "-m", "build_engines", "compile", "--help")
    require(True, "build_engines compile is there")
    kind, *health = (config.get("Healthcheck") or inspected["Healthcheck"])["Test"]  # Docker's place, and Podman's
    require(kind == "CMD", "the health check needs no shell")
    return [str(word) for word in health]


def serve(engine: Engine, image: str, health: Sequence[str], *, rtx: bool, gpu: bool) -> None:
    """Start it with a read-only root, without capabilities and without a network, and ask it for pictures."""
    volume = f"latentd-check-{uuid.uuid4().hex[:8]}"
    options = ("--volume", f"{volume}:/bundles") if gpu else ()
    try:
        with engine.container(image, *options) as container:
            seconds = timed(lambda: wait_for(container))
            require(True, f"ready after {seconds:.1f} s: read-only root, no capabilities, no network")
            container.do(*health)
            require(True, "the health check agrees")
            seconds = timed(lambda: container.do(*JUDGE))
            require(True, f"40 pictures were drawn and judged, and show what was asked, in {seconds:.1f} s")
            if gpu:
                owner = container.do("stat", "--format", "%u", "/bundles/demo/manifest.json").strip()
                require(owner == "10001", "the empty volume was filled with the demo bundle, its user's own")
            memory = re.findall(r"VmHWM:\s+(\d+) kB", container.do("cat", "/proc/1/status"))
            require(memory, f"it took {int(memory[0]) / 1000:.0f} MB of memory at the peak")
            if rtx:
                compile_there(container)
            stop(engine, container)
    finally:
        with suppress(CheckFailed):
            engine("volume", "rm", "--force", volume)


def wait_for(container: Container) -> None:
    deadline = time.monotonic() + 120
    while not container.is_ready():
        state = container.engine.inspect(container.name)["State"]["Status"]
        if state != "running" or time.monotonic() > deadline:
            raise CheckFailed(f"not ready, the container is {state}")
        time.sleep(0.2)


def compile_there(container: Container) -> None:
    seconds = timed(lambda: container.do(*COMPILE, "--precision", "fp32"))
    require(True, f"engines for TensorRT for RTX were compiled into the volume in {seconds:.1f} s")


def stop(engine: Engine, container: Container) -> None:
    seconds = timed(lambda: engine("stop", "--time", str(STOP_SECONDS), container.name))
    code = engine.inspect(container.name)["State"]["ExitCode"]
    require(seconds < STOP_SECONDS and code == 0, f"SIGTERM ended it in {seconds:.1f} s with exit code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stand-in", action="append", choices=("base", "tensorrt"), default=[])
    given = parser.parse_args()
    parts = needed(stages(ROOT / "Dockerfile"), given.target)
    try:
        engine = Engine()
        if "base" in given.stand_in:
            parts = with_stand_in(engine, parts)
        with context_of(parts, without_tensorrt="tensorrt" in given.stand_in) as context:
            image = build(engine, context, parts, lent="base" in given.stand_in)
        health = look(engine, image)
        serve(engine, image, health, rtx="tensorrt" in given.stand_in, gpu=given.target == "cuda")
    except CheckFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
