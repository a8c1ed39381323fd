"""Where a program that a test runs is missing."""

from __future__ import annotations

import os

import pytest

from tests.support.programs import program


def test_without_a_program_tests_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere"})
    with pytest.raises(pytest.skip.Exception, match="scripts/system-packages"):
        program("no-such-browser")


def test_continuous_integration_does_not_skip_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere", "CI": "true"})
    with pytest.raises(pytest.fail.Exception, match="scripts/helm"):
        program("no-such-program", installed_by="scripts/helm")
