"""The images by their recipe: `scripts/check-image` builds and runs them, where there is Docker or Podman."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import dockerfile
import pytest

from server.startup.settings import ServerSettings
from server.startup.stopping import GRACE_SECONDS
from tests import ROOT
from tests.tools.docker_image import STOP_SECONDS, DockerfileStage, needed, stages, text_of

STAGES = stages(ROOT / "Dockerfile")
TARGETS = ("cpu", "cuda")
PINNED = re.compile(r"python:\d+\.\d+\.\d+-slim-[a-z]+")


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
def test_every_base_is_a_stage_or_a_version(stage: DockerfileStage) -> None:
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


def test_the_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = last("cpu", "LABEL").value
    stated = dict(zip(labels[::2], labels[1::2], strict=True))
    assert stated["org.opencontainers.image.version"].strip('"') == project["version"]
    assert stated["org.opencontainers.image.licenses"].strip('"') == project["license"]


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
