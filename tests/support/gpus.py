"""Parameters for what runs on a GPU only: skipped, with the reason, where there is none that will do."""

from __future__ import annotations

from typing import Any

import pytest

from engines.backends.available import unavailable_reason


def on_a_gpu(backend: str) -> Any:
    """`backend`, as a parameter."""
    reason = unavailable_reason(backend)
    skip = pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")
    return pytest.param(backend, marks=[pytest.mark.gpu, skip])
