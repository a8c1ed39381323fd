"""The figure of docs/executor.md shows what the executor does now."""

from __future__ import annotations

from pathlib import Path

from tests import ROOT
from tests.tools.timeline import draw, record


def test_the_figure_is_up_to_date(tmp_path: Path) -> None:
    drawn = draw(record(tmp_path / "trace.json"))
    current = (ROOT / "docs" / "timeline.svg").read_text(encoding="utf-8") == drawn
    assert current, "draw it again: python -m tests.tools.timeline"
