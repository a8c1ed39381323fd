"""Programs of the system that tests run: a browser, proxies, Prometheus' and Kubernetes' tools."""

from __future__ import annotations

import os
import shutil

import pytest

from tests import ROOT


def program(*names: str, installed_by: str = "scripts/system-packages") -> str:
    """The path of the first of `names` there is.

    Where there is none, the test is skipped; in continuous integration it fails.
    """
    # Debian has daemons where only the administrator's shell looks for them.
    path = os.pathsep.join([str(ROOT / "build/helm"), os.environ.get("PATH", ""), "/usr/sbin"])
    found = next((where for name in names if (where := shutil.which(name, path=path))), None)
    if found is None:
        missing = f"{names[0]} is not on this machine: install it ({installed_by} does)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return found
