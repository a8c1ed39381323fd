"""What the gate makes of pip-audit's answers: a vulnerability fails it, a service without an answer is a warning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

FINE = {"dependencies": [{"name": "pillow", "version": "12.0", "vulns": []}]}
VULNERABLE = {
    "dependencies": [
        {"name": "pillow", "version": "12.0", "vulns": [{"id": "CVE-2027-1", "fix_versions": ["12.1"]}]},
        {"name": "numpy", "version": "2.0", "vulns": []},
    ]
}
UNKNOWN = {"dependencies": [{"name": "pillow", "skip_reason": "Dependency not found"}]}


@pytest.mark.parametrize(
    ("report", "pip_audit_code", "code", "message"),
    [
        (json.dumps(FINE), 0, 0, ""),
        (json.dumps(VULNERABLE), 1, 1, "scripts/audit: pillow 12.0: CVE-2027-1, fixed in 12.1"),
        (json.dumps(UNKNOWN), 0, 0, "warning: packages could not be audited"),
        ("", 1, 0, "warning: packages could not be audited"),
    ],
)
def test_audit(report: str, pip_audit_code: int, code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/audit", tmp_path / "scripts/audit")
    (tmp_path / "scripts/constraints.txt").write_text("pillow==12.0\nnumpy==2.0\n")
    fake = tmp_path / ".venv/bin/pip-audit"
    fake.write_text(f"#!/bin/sh\nprintf '%s' '{report}'\nexit {pip_audit_code}\n")
    fake.chmod(0o755)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    done = subprocess.run([tmp_path / "scripts/audit"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert bool(done.stderr) == bool(message)
