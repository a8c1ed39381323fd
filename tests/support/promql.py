"""The Prometheus queries in documents."""

from __future__ import annotations

import re

from tests import ROOT

_BLOCK = re.compile(r"^ *```promql\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def document_queries() -> list[str]:
    """The queries in the documents for operators, one a line."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/operating").glob("*.md"))]
    return [line.strip() for text in texts for block in _BLOCK.findall(text) for line in block.splitlines()]
