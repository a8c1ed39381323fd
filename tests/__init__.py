"""The tests, by the layout of what they test; `support` is what they share, `tools` what people run by hand."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
