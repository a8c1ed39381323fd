"""One description of a backend is all that others know of it."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from build_engines import VerifyCommand
from engines.backends import registry
from engines.backends.available import choose, unavailable_reason
from engines.backends.host import HostDevice
from engines.backends.registry import BACKENDS, ON_CPU, ON_GPU, SPECS, BackendSpec, open_device, register
from engines.build.compile import engine_precisions
from engines.cli import Metavar, parse
from engines.errors import EngineError
from server.startup.settings import ServerSettings


def open_fake_device(*, threads: int) -> HostDevice:
    assert threads == 3
    return HostDevice()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is nothing but its entry and this module."""
    spec = BackendSpec(
        name="fake", module=__name__, extra="fast", packages=("numpy",), precisions=("fp32", "bf16"), runs_on="cpu"
    )
    monkeypatch.setitem(SPECS, "fake", spec)
    return "fake"


def test_an_entry_makes_a_backend(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "open_device", open_fake_device)
    assert isinstance(registry.open_device(fake, threads=3), HostDevice)
    assert unavailable_reason(fake) is None
    assert choose([fake]).backend == fake
    assert set(engine_precisions(fake, None).values()) == {"fp32"}
    with pytest.raises(EngineError, match="fake computes in fp32 or bf16, not in fp16"):
        engine_precisions(fake, "fp16")


def test_an_entry_is_a_choice_of_the_command_line(
    fake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = parse(VerifyCommand, [str(tmp_path), "--backend", fake], prog="verify")
    assert command.backend == (fake,)
    with pytest.raises(SystemExit):
        parse(VerifyCommand, [str(tmp_path), "--backend", "metal"], prog="verify")
    assert "onnxruntime, fake" in capsys.readouterr().err
    with pytest.raises(EngineError, match="onnxruntime, fake"):
        open_device("metal")


def test_the_help_lists_every_backend() -> None:
    assert Metavar("{" + ",".join(SPECS) + "}") in VerifyCommand.model_fields["backend"].metadata
    assert ", ".join(SPECS) in str(ServerSettings.model_fields["backend"].description)


def test_a_registered_backend_replaces_the_one_of_its_name(fake: str) -> None:
    register(replace(SPECS[fake], packages=("no-such",)))
    assert unavailable_reason(fake) == "not installed"


def test_a_backend_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BackendSpec(
        name="absent", module="no_such_module", extra="fast", packages=("no-such",), precisions=("fp32",), runs_on="cpu"
    )
    monkeypatch.setitem(SPECS, "absent", spec)
    assert unavailable_reason("absent") == "not installed"
    with pytest.raises(EngineError, match=r"absent needs the package no_such_module: .*\[fast\]"):
        open_device("absent")


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError, match=f"Unknown backend 'metal': choose one of {', '.join(BACKENDS)}"):
        open_device("metal")


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: str(spec.name))
def test_every_entry_is_true(spec: BackendSpec) -> None:
    """Its module exists, and its extra installs one of its packages."""
    assert find_spec(spec.module)
    assert (spec.name in ON_CPU) != (spec.name in ON_GPU)
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{spec.extra} = [" in project
    assert spec.packages[0] in project


def test_packages_are_distributions() -> None:
    """Those that are installed here are found by the names in the entries."""
    found = []
    for spec in SPECS.values():
        for package in spec.packages:
            try:
                found.append(version(package))
            except PackageNotFoundError:
                continue
    assert found
