"""Build an image of the Dockerfile stage by stage, and check what docs/deployment.md says of the container.

scripts/check-image                        the image for CPUs, with Docker or else Podman
scripts/check-image cuda                   the image for GPUs, which serves its demo on the CPU without one
scripts/check-image --stand-in base        without an image registry: Debian's packages, by debootstrap
scripts/check-image --stand-in tensorrt    without NVIDIA's package index: TensorRT for RTX, from PyPI
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
from string import Template
from typing import Any

import dockerfile

from tests import ROOT

# Mounted into builds on a stand-in base, which lacks this network's certificates and mirrors.
HOST_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
IGNORED = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "bundles", "demo-checkpoint", "demo-state")
HARDENED = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all")  # noqa: S108 - the container's
CHECK_IMAGES = ("python", "-m", "engines.demo.check", "--url", "http://127.0.0.1:8000", "--prompts", "40")
COMPILE = ("python", "-m", "build_engines", "compile", "/bundles/demo", "--backend", "tensorrt_rtx")
COMPILERS = ("cc", "gcc", "g++", "clang", "nvcc", "ld")
SBOM = "/usr/share/doc/latentd/sbom.cdx.json"
INSTALLED = (
    "import importlib.metadata as m, json; print(json.dumps([[one.name, one.version] for one in m.distributions()]))"
)
STOP_SECONDS = 10  # Docker's default timeout


class CheckFailed(Exception):
    """The image fails a check; the message says which."""


@dataclass(frozen=True)
class DockerfileStage:
    """One `FROM … AS name` of the Dockerfile."""

    name: str
    base: str
    commands: list[dockerfile.Command] = field(default_factory=list)

    @property
    def needs(self) -> set[str]:
        """The stages that it needs: its base and those it copies from."""
        copied = (flag for command in self.commands if command.cmd == "COPY" for flag in command.flags)
        return {self.base, *(flag.removeprefix("--from=") for flag in copied if flag.startswith("--from="))}


def stages(path: Path) -> dict[str, DockerfileStage]:
    """Return the stages of a Dockerfile in order, read by BuildKit's own parser, on the bases that it names."""
    found: list[DockerfileStage] = []
    defaults: dict[str, str] = {}
    for command in dockerfile.parse_file(str(path)):
        if command.cmd == "FROM":
            base, _, name = command.value
            found.append(DockerfileStage(name, Template(base).substitute(defaults)))
        elif found:
            found[-1].commands.append(command)
        else:  # ARG is all that may come before the first stage
            defaults |= [word.split("=", 1) for word in command.value]
    return {stage.name: stage for stage in found}


def needed(everything: dict[str, DockerfileStage], target: str) -> dict[str, DockerfileStage]:
    """Return `target` and the stages it needs, in order."""
    wanted, todo = set[str](), [target]
    while todo:
        name = todo.pop()
        if name in everything and name not in wanted:
            wanted.add(name)
            todo.extend(everything[name].needs)
    return {name: stage for name, stage in everything.items() if name in wanted}


def text_of(parts: dict[str, DockerfileStage]) -> str:
    """Return a Dockerfile of these stages alone: older Podman builds all stages before the target, needed or not."""
    lines: list[str] = []
    for stage in parts.values():
        lines.append(f"FROM {stage.base} AS {stage.name}")
        lines += [command.original for command in stage.commands]
    return "\n".join(lines) + "\n"


def packages_of(sbom: dict[str, Any]) -> set[tuple[str, str]]:
    """Return name and version of each package that an SBOM of CycloneDX lists, the program itself among them."""
    return {(one["name"], one["version"]) for one in (sbom["metadata"]["component"], *sbom["components"])}


def run(*command: str) -> str:
    """Run `command` and return its output. Raises CheckFailed with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise CheckFailed(f"{' '.join(command)} exited with {done.returncode}:\n{last}")
    return done.stdout


def works(engine: str) -> bool:
    """Whether the engine is installed, and its daemon runs if it has one."""
    with suppress(CheckFailed, FileNotFoundError):
        return bool(run(engine, "info"))
    return False


class ContainerEngine:
    """Docker, or Podman with the options that it needs without systemd and with fixed limits."""

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

    def build(self, context: Path, stage: str, tag: str, *, mount_host_files: bool) -> None:
        volumes = [f"--volume={path}:{path}:ro" for path in HOST_FILES if mount_host_files and Path(path).exists()]
        self("build", *self._building, *volumes, "--target", stage, "--tag", tag, str(context))

    def once(self, image: str, *command: str) -> str:
        """Run a command in a new container and return its output."""
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
    """A running container."""

    engine: ContainerEngine
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


def bootstrap(engine: ContainerEngine, image: str, release: str) -> None:
    """Build `image` from Debian's packages, with Python at the path of the official images."""
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    with tempfile.TemporaryDirectory() as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        run("debootstrap", "--variant=minbase", f"--include={packages}", release, str(root))
        shutil.rmtree(root / "var/cache/apt")
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):  # nothing else in the image uses its Python
            marker.unlink()
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        run("tar", "--create", "--directory", str(root), "--file", str(archive), ".")
        engine("import", str(archive), image)


def with_stand_in(engine: ContainerEngine, parts: dict[str, DockerfileStage]) -> dict[str, DockerfileStage]:
    """Return `parts` on an image of Debian's packages, of the release that the base's tag ends with."""
    base = parts["base"]
    release = base.base.partition("@")[0].rpartition("-")[2]
    image = f"localhost/latentd-check:debian-{release}"
    seconds = 0.0 if engine.has(image) else timed(lambda: bootstrap(engine, image, release))
    say(f"stand-in for {base.base}: Debian's packages (built in {seconds:.1f} s)")
    return {**parts, "base": replace(base, base=image)}


@contextmanager
def context_of(parts: dict[str, DockerfileStage], *, without_tensorrt: bool) -> Iterator[Path]:
    """Copy this repository as a build context whose Dockerfile has `parts` alone."""
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder) / "latentd"
        shutil.copytree(ROOT, context, ignore=IGNORED)
        (context / "Dockerfile").write_text(text_of(parts), encoding="utf-8")
        if without_tensorrt:
            project = context / "pyproject.toml"
            text, found = re.subn(r'"tensorrt>=[^"]*"', '"tensorrt-rtx>=1.7"', project.read_text(encoding="utf-8"))
            require(found, "tensorrt-rtx replaces the requirement tensorrt")
            project.write_text(text, encoding="utf-8")
        yield context


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def row(*cells: object) -> None:
    say(f"| {' | '.join(map(str, cells))} |")


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that `function` takes."""
    began = time.monotonic()
    function()
    return time.monotonic() - began


def build(engine: ContainerEngine, context: Path, parts: dict[str, DockerfileStage], *, mount_host_files: bool) -> str:
    """Build each stage, print a table of them, and return the last one's image."""
    row("stage", "seconds", "MB", "packages")
    row("---", "---:", "---:", "---:")
    tag = ""
    for name in parts:
        tag = f"localhost/latentd-check:{name}"
        seconds = timed(partial(engine.build, context, name, tag, mount_host_files=mount_host_files))
        count = "import importlib.metadata as m; print(len({one.name for one in m.distributions(path=['%s'])}))"
        site = engine.once(tag, "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        packages = engine.once(tag, "python", "-c", count % site).strip()
        row(name, f"{seconds:.1f}", f"{engine.inspect(tag)['Size'] / 1e6:.0f}", packages)
    return tag


def require(condition: object, what: str) -> None:
    if not condition:
        raise CheckFailed(what)
    say(f"ok: {what}")


def check_contents(engine: ContainerEngine, image: str) -> list[str]:
    """Check the image's contents and configuration. Returns its health check's command."""
    inspected = engine.inspect(image)
    config = inspected["Config"]
    uid = engine.once(image, "id", "-u").strip()
    require(uid == config["User"].partition(":")[0] == "10001", f"the user is {uid}, not root")
    require(config["Entrypoint"] == ["latentd"], "the entry point is latentd itself, which receives signals")
    require(config.get("StopSignal", "SIGTERM") in {"SIGTERM", "15"}, "the stop signal is SIGTERM")
    for module in ("torch", "onnx", "diffusers", "transformers"):
        find = f"import sys; from importlib.util import find_spec; sys.exit(find_spec('{module}') is not None)"
        engine.once(image, "python", "-c", find)
    require(True, "no torch, no onnx, no diffusers, no transformers")
    found = engine.once(image, "sh", "-c", f"for one in {' '.join(COMPILERS)}; do command -v $one || true; done")
    require(not found.strip(), "no compiler")
    engine.once(image, "sh", "-c", 'test -z "$(find /opt/latentd -writable -not -type l | head -1)"')
    require(True, "the code is read-only for its user")
    engine.once(image, "python", "-m", "build_engines", "compile", "--help")
    require(True, "build_engines compile runs")
    listed = packages_of(json.loads(engine.once(image, "cat", SBOM)))
    installed = {(name, version) for name, version in json.loads(engine.once(image, "python", "-c", INSTALLED))}
    require(listed == installed, f"the SBOM lists the {len(installed)} packages that are installed")
    kind, *health = (config.get("Healthcheck") or inspected["Healthcheck"])["Test"]  # Docker's place, and Podman's
    require(kind == "CMD", "the health check needs no shell")
    return [str(word) for word in health]


def serve(engine: ContainerEngine, image: str, health: Sequence[str], *, rtx: bool, gpu: bool) -> None:
    """Start it with a read-only root, no capabilities and no network, and generate images."""
    volume = f"latentd-check-{uuid.uuid4().hex[:8]}"
    options = ("--volume", f"{volume}:/bundles") if gpu else ()
    try:
        with engine.container(image, *options) as container:
            seconds = timed(lambda: wait_for(container))
            require(True, f"ready after {seconds:.1f} s: read-only root, no capabilities, no network")
            container.do(*health)
            require(True, "the health check passes")
            seconds = timed(lambda: container.do(*CHECK_IMAGES))
            require(True, f"40 generated images show their prompts, in {seconds:.1f} s")
            if gpu:
                owner = container.do("stat", "--format", "%u", "/bundles/demo/manifest.json").strip()
                require(owner == "10001", "the empty volume has the demo bundle, owned by its user")
            memory = re.findall(r"VmHWM:\s+(\d+) kB", container.do("cat", "/proc/1/status"))
            require(memory, f"peak memory {int(memory[0]) / 1000:.0f} MB")
            if rtx:
                compile_in_container(container)
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


def compile_in_container(container: Container) -> None:
    seconds = timed(lambda: container.do(*COMPILE, "--precision", "fp32"))
    require(True, f"compiled engines for TensorRT for RTX into the volume in {seconds:.1f} s")


def stop(engine: ContainerEngine, container: Container) -> None:
    seconds = timed(lambda: engine("stop", "--time", str(STOP_SECONDS), container.name))
    code = engine.inspect(container.name)["State"]["ExitCode"]
    require(seconds < STOP_SECONDS and code == 0, f"exits {seconds:.1f} s after SIGTERM with code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stand-in", action="append", choices=("base", "tensorrt"), default=[])
    given = parser.parse_args()
    parts = needed(stages(ROOT / "Dockerfile"), given.target)
    try:
        engine = ContainerEngine()
        if "base" in given.stand_in:
            parts = with_stand_in(engine, parts)
        with context_of(parts, without_tensorrt="tensorrt" in given.stand_in) as context:
            image = build(engine, context, parts, mount_host_files="base" in given.stand_in)
        health = check_contents(engine, image)
        serve(engine, image, health, rtx="tensorrt" in given.stand_in, gpu=given.target == "cuda")
    except CheckFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
