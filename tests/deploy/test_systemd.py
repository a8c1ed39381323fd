"""The systemd unit, with systemd's own checks; nothing here has systemd as its first process."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from server.startup.settings import ServerSettings
from server.startup.stopping import GRACE_SECONDS
from tests import ROOT
from tests.support.programs import program

UNIT = ROOT / "deploy/systemd/latentd.service"
TEXT = UNIT.read_text(encoding="utf-8")
EXPOSURE = 1.5  # at most, of 10: a web server of a distribution has about 9


def setting(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", TEXT, re.MULTILINE)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program("systemd-analyze"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own command


def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    """With a program that is there: systemd looks for it."""
    unit = tmp_path / UNIT.name
    unit.write_text(TEXT.replace("/opt/latentd/.venv/bin/latentd", "/bin/true"), encoding="utf-8")
    done = analyze("verify", "--man=no", unit)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(TEXT.replace("ProtectHome", "ProtectHomes"), encoding="utf-8")
    assert "ProtectHomes" in analyze("verify", "--man=no", unit).stderr


def test_it_may_do_no_more_than_it_must() -> None:
    done = analyze("security", "--offline=true", "--no-pager", f"--threshold={int(10 * EXPOSURE)}", UNIT)
    assert done.returncode == 0, done.stdout


def test_it_drains_before_systemd_kills() -> None:
    (stop,) = setting("TimeoutStopSec")
    (drain,) = re.findall(r"LATENTD_DRAIN_SECONDS=(\d+)", TEXT)
    assert int(drain) + GRACE_SECONDS < int(stop)


def test_its_variables_are_settings() -> None:
    ours = {name.lower() for name in re.findall(r"LATENTD_(\w+)=", TEXT)}
    assert ours <= ServerSettings.model_fields.keys()


def test_it_restarts_after_a_device_failed_and_not_after_a_failed_start() -> None:
    """By the table of exit codes in docs/deployment.md."""
    table = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    codes = dict(re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", table, re.MULTILINE))
    assert setting("Restart") == ["on-failure"]
    after_fixing = {code for code, restart in codes.items() if restart.startswith("after")}
    assert set(setting("RestartPreventExitStatus")[0].split()) == after_fixing
    assert codes["70"] == "at once"
