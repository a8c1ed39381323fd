"""Where there is no browser."""

from __future__ import annotations

import os

import pytest

from tests.support.browsing import chromium


def test_without_a_browser_tests_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere"})
    with pytest.raises(pytest.skip.Exception, match="scripts/browser"):
        chromium()


def test_continuous_integration_does_not_skip_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere", "CI": "true"})
    with pytest.raises(pytest.fail.Exception, match="scripts/browser"):
        chromium()
