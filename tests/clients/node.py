"""Run the scripts of `js/`, which call the server with a JavaScript client and print what it gave as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parent / "js"
_NODE = shutil.which("node")
_INSTALLED = (_FOLDER / "node_modules").is_dir()

needs_node = pytest.mark.skipif(
    _NODE is None or not _INSTALLED,
    reason="needs the JavaScript clients: scripts/setup dev installs them where Node.js and npm are",
)


def run(script: str, case: str, url: str) -> dict[str, Any]:
    """What `case` of `script` printed, called for the server at `url`."""
    command = [_NODE or "node", script, case, url]
    done = subprocess.run(command, cwd=_FOLDER, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - our own
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed
