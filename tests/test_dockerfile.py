"""The images by their recipe: `scripts/check-image` builds and runs them, where there is Docker or Podman."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import ClassVar

import dockerfile
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.startup.settings import ServerSettings
from server.startup.stopping import GRACE_SECONDS
from tests import ROOT
from tests.tools.docker_image import SBOM, STOP_SECONDS, DockerfileStage, needed, packages_of, stages, text_of

STAGES = stages(ROOT / "Dockerfile")
TARGETS = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
UNLICENSED = {"protobuf"}  # its licence is a text in its wheel, which its metadata do not name
PINNED = re.compile(r"python:\d+\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}")


def inherited(name: str) -> list[dockerfile.Command]:
    """The commands of a stage and of those it comes from, the first of them first."""
    stage = STAGES[name]
    return [*(inherited(stage.base) if stage.base in STAGES else []), *stage.commands]


def last(target: str, instruction: str) -> dockerfile.Command:
    return [command for command in inherited(target) if command.cmd == instruction][-1]


def variables(target: str) -> dict[str, str]:
    values = (command.value for command in inherited(target) if command.cmd == "ENV")
    return {name: text for one in values for name, text in zip(one[::2], one[1::2], strict=True)}


def copied_from_here() -> list[str]:
    commands = (command for stage in STAGES.values() for command in stage.commands if command.cmd == "COPY")
    return [
        source
        for command in commands
        if not any(flag.startswith("--from") for flag in command.flags)
        for source in command.value[:-1]
    ]


def requirements(*extras: str) -> list[str]:
    command = [str(ROOT / "scripts/requirements"), *extras]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()  # noqa: S603 - our own command


def names(lines: list[str]) -> set[str]:
    """The packages that requirements or constraints name, as they are compared."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in found if name}


def lines_of(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def test_cpu_is_what_one_gets_without_asking() -> None:
    assert set(TARGETS) <= STAGES.keys()
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_base_is_a_stage_or_pinned(stage: DockerfileStage) -> None:
    assert stage.base in STAGES or PINNED.fullmatch(stage.base)


def test_nothing_is_downloaded_but_packages() -> None:
    assert not [command for stage in STAGES.values() for command in stage.commands if command.cmd == "ADD"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_nobody_in_particular(target: str) -> None:
    (user,) = last(target, "USER").value
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", user)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_hears_signals_itself(target: str) -> None:
    entry = last(target, "ENTRYPOINT")
    assert entry.json  # the exec form: no shell stands between
    assert entry.value == ("latentd",)
    assert last(target, "STOPSIGNAL").value == ("SIGTERM",)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_drains_before_docker_kills(target: str) -> None:
    assert int(variables(target)["LATENTD_DRAIN_SECONDS"]) + GRACE_SECONDS < STOP_SECONDS


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_s_variables_are_settings(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: text for name, text in variables(target).items() if name.startswith("LATENTD_")}
    assert {name.removeprefix("LATENTD_").lower() for name in ours} <= ServerSettings.model_fields.keys()
    for name, text in ours.items():
        monkeypatch.setenv(name, text)
    assert ServerSettings().host == "0.0.0.0"  # noqa: S104 - in a container, where a port is open to whom it is published


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_told_of_its_use(target: str) -> None:
    assert variables(target)["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_engines_of_the_gpu_s_image_have_a_place() -> None:
    (volume,) = last("cuda", "VOLUME").value
    bundle = variables("cuda")["LATENTD_BUNDLE"]
    filled = [command for command in STAGES["cuda"].commands if command.cmd == "COPY" and command.value[-1] == volume]
    assert Path(bundle).is_relative_to(volume)
    assert list(filled[0].flags) == ["--from=code", "--chown=10001:10001"]


def test_each_target_takes_only_its_own_packages() -> None:
    assert "cuda-packages" not in needed(STAGES, "cpu")
    assert "cpu-packages" not in needed(STAGES, "cuda")
    assert "FROM runtime AS cpu" in text_of(needed(STAGES, "cpu"))


def labels(target: str) -> dict[str, str]:
    values = (command.value for command in inherited(target) if command.cmd == "LABEL")
    return {name: text.strip('"') for one in values for name, text in zip(one[::2], one[1::2], strict=True)}


@pytest.mark.parametrize("target", TARGETS)
def test_labels_are_the_project_s(target: str) -> None:
    stated = {name.removeprefix("org.opencontainers.image."): text for name, text in labels(target).items()}
    assert stated == {
        "title": PROJECT["name"],
        "description": PROJECT["description"],
        "version": PROJECT["version"],
        "licenses": PROJECT["license"],
        "revision": "${REVISION}",
        "created": "${CREATED}",
    }
    given = [command.value[0] for command in STAGES[target].commands if command.cmd == "ARG"]
    assert given == ['REVISION=""', 'CREATED=""']
    assert STAGES[target].commands[-1].cmd == "LABEL"  # what differs from build to build is the last layer


@pytest.mark.parametrize(
    ("target", "architecture", "refused"),
    [
        ("cpu", "amd64", ""),
        ("cpu", "arm64", ""),
        ("cpu", "riscv64", "amd64 and arm64"),
        ("cuda", "amd64", ""),
        ("cuda", "arm64", "for amd64 alone"),
    ],
)
def test_an_architecture_without_wheels_is_refused(
    target: str, architecture: str, refused: str, tmp_path: Path
) -> None:
    dpkg = tmp_path / "dpkg"
    dpkg.write_text(f"#!/bin/sh\necho {architecture}\n")
    dpkg.chmod(0o755)
    check = next(command.value[0] for command in STAGES[f"{target}-packages"].commands if command.cmd == "RUN")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["/bin/sh", "-c", check], env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - from the Dockerfile
    assert bool(done.returncode) == bool(refused)
    assert refused in done.stderr
    assert done.stderr.count("\n") == bool(refused)


def test_what_is_copied_is_there_and_let_through() -> None:
    let_through = [line.removeprefix("!") for line in lines_of(".dockerignore") if line.startswith("!")]
    for source in copied_from_here():
        assert (ROOT / source).exists()
        assert any(Path(source).is_relative_to(one) for one in let_through)


def test_nothing_else_is_sent_to_the_builder() -> None:
    """Neither the repository's history nor an environment with torch, gigabytes of it."""
    rules = [line for line in lines_of(".dockerignore") if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert rules[-1] == "**/__pycache__"
    assert {rule.removeprefix("!") for rule in rules[1:-1]} == set(copied_from_here())


@pytest.mark.parametrize(("extra", "files"), [("cpu", 1), ("cuda", 2)])
def test_every_requirement_is_pinned(extra: str, files: int) -> None:
    constraints = ["scripts/constraints.txt", "scripts/constraints-cuda.txt"][:files]
    pinned = [line for path in constraints for line in lines_of(path)]
    assert names(requirements(extra, "compile")) <= names(pinned)
    install = " ".join(str(command.value) for command in STAGES[f"{extra}-packages"].commands)
    assert all(f"--constraint {path}" in install for path in constraints)
    assert install.count("--constraint") == files


def test_no_package_is_pinned_twice() -> None:
    """pip would refuse two versions, and only on the day somebody builds the image."""
    assert not names(lines_of("scripts/constraints.txt")) & names(lines_of("scripts/constraints-cuda.txt"))


def test_requirements_of_extras_that_name_extras() -> None:
    output = requirements("rtx", "compile")
    assert {"onnxruntime", "tensorrt-rtx", "rich", "fastapi"} <= names(output)
    assert "latentd" not in names(output)
    assert len(output) == len(set(output))


def test_an_image_may_have_more_extras() -> None:
    output = requirements("cpu", "compile", "jobs,ray")
    assert {"onnxruntime", "ray", "sqlalchemy"} <= names(output)
    assert requirements("cpu", "compile", "") == requirements("cpu", "compile")
    for target in TARGETS:
        install = " ".join(str(command.value) for command in STAGES[f"{target}-packages"].commands)
        assert '"${EXTRAS}"' in install


class Answering(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        self.send_response(self.statuses.get(self.path, 404))
        self.end_headers()

    def log_message(self, format: str, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that is so alive, and its port."""
    Answering.statuses = {"/v2/health/live": status}
    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_whether_the_process_lives(status: int, healthy: bool) -> None:
    asked = re.search(r"CMD (\[.*\])$", last("cpu", "HEALTHCHECK").original)
    assert asked
    command = [sys.executable, *json.loads(asked[1])[1:]]
    with answering(status) as port:
        environment = os.environ | {"LATENTD_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
        done = subprocess.run(command, env=environment, capture_output=True, check=False)  # noqa: S603 - from the Dockerfile
    assert (done.returncode == 0) == healthy


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)  # noqa: S603 - installed beside us
    assert not done.stdout


def closure(names_: set[str]) -> dict[str, Distribution]:
    """The installed packages that these need here, themselves among them, by their names."""
    found: dict[str, Distribution] = {}
    todo = sorted(names_)
    while todo:
        package = distribution(todo.pop())
        if found.setdefault(canonicalize_name(package.name), package) is package:
            needed_ = map(Requirement, package.requires or ())
            todo += [one.name for one in needed_ if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


def environment_of(packages: Iterable[Distribution], folder: Path) -> None:
    """An environment as the image has it, whose packages are those installed here, and the project itself."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in packages:
        metadata = Path(str(package.locate_file(""))) / Path(str(package._path)).name  # type: ignore[attr-defined]
        (site / metadata.name).symlink_to(metadata)
    ours = site / f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    ours.mkdir()
    (ours / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n")


def test_the_sbom_lists_what_is_installed(tmp_path: Path) -> None:
    """The Dockerfile's own command, over what the image for CPUs installs."""
    packages = closure(names(requirements("cpu", "compile")))
    environment_of(packages.values(), tmp_path / "latentd")
    command = shlex.split(STAGES["cpu-sbom"].commands[-1].value[0])
    places = {"/opt/latentd": str(tmp_path / "latentd"), "/sbom.cdx.json": str(tmp_path / "sbom.cdx.json")}
    program, *arguments = (places.get(word, word) for word in command)
    subprocess.run([Path(sys.executable).with_name(Path(program).name), *arguments], cwd=ROOT, check=True)  # noqa: S603 - from the Dockerfile
    text = (tmp_path / "sbom.cdx.json").read_text(encoding="utf-8")
    sbom = json.loads(text)
    assert "--validate" in command  # against CycloneDX' schema, or the command fails
    assert packages_of(sbom) == {(one.name, one.version) for one in packages.values()} | {
        (PROJECT["name"], PROJECT["version"])
    }
    assert {one["name"] for one in sbom["components"] if not one.get("licenses")} <= UNLICENSED
    assert str(tmp_path) not in text


def test_both_images_have_their_sbom() -> None:
    for target in TARGETS:
        made = STAGES[f"{target}-sbom"]
        assert made.base == f"{target}-packages"
        assert made.commands[-1].value == STAGES["cpu-sbom"].commands[-1].value
        assert any(command.value == ("/sbom.cdx.json", SBOM) for command in STAGES[target].commands)
