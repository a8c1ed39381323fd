"""The figure of docs/executor.md shows what the executor does now."""

from __future__ import annotations

import re
from pathlib import Path

from tests import ROOT
from tests.tools.timeline import draw, record


def test_the_figure_is_up_to_date(tmp_path: Path) -> None:
    drawn = work(draw(record(tmp_path / "trace.json")))
    current = work((ROOT / "docs" / "timeline.svg").read_text(encoding="utf-8")) == drawn
    assert drawn
    assert current, "draw it again: python -m tests.tools.timeline"


def work(figure: str) -> list[str]:
    """The launches, steps, encodes and decodes, each with its place; the host's polling in between may differ."""
    return re.findall(r"<rect .*<title>(?:launch|step|encode|decode)\b.*", figure)
