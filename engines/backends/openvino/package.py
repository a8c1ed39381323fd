"""The package `openvino`, which others import from here."""

from __future__ import annotations

import sys

# OpenVINO sends usage statistics when it is imported, unless this package of its own is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None marks a module as missing

import openvino as openvino  # noqa: E402, PLC0414 - after that line
