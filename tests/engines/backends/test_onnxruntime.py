"""ONNX Runtime on the CPU: the options of its sessions."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import onnxruntime
import pytest

from engines.backends.onnxruntime import OnnxRuntimeDevice

_SPINNING = "session.intra_op.allow_spinning"


@pytest.mark.parametrize("urgent", [True, False])
def test_only_the_threads_of_steps_spin(urgent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    output: dict[str, str] = {}
    options = MagicMock()
    options.add_session_config_entry = output.__setitem__
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", MagicMock())
    device = OnnxRuntimeDevice(threads=2)
    device.load(Path("decode.onnx"), device.stream("tests", urgent=urgent), read=lambda _path: b"")
    assert output.get(_SPINNING) == (None if urgent else "0")
