"""OpenVINO on the CPU: models for shapes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.backends.host import HostBuffer
from engines.backends.openvino import device as backend
from engines.backends.openvino.device import OpenVinoDevice
from engines.backends.openvino.package import openvino

ops = openvino.opset13


@pytest.fixture
def scaling(tmp_path: Path) -> Path:
    """A graph of one weight, which doubles its input."""
    x = ops.parameter([-1, 3], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})
    y = ops.multiply(x, np.float32(2))
    y.output(0).tensor.set_names({"y"})
    openvino.save_model(openvino.Model([y], [x]), tmp_path / "scaling.xml")
    return tmp_path / "scaling.xml"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shape of the input of each model that is compiled, as it happens."""
    shapes: list[str] = []
    compile_model: Callable[..., openvino.CompiledModel] = openvino.Core.compile_model

    def counted(core: openvino.Core, model: openvino.Model, *rest: object) -> openvino.CompiledModel:
        shapes.append(str(model.inputs[0].get_partial_shape()))
        return compile_model(core, model, *rest)

    monkeypatch.setattr(openvino.Core, "compile_model", counted)
    return shapes


def run(path: Path, *, urgent: bool) -> None:
    """Double inputs of 2, 4, and again 2 rows."""
    device = OpenVinoDevice(threads=1)
    engine = device.load(path, device.stream("tests", urgent=urgent))
    for rows in (2, 4, 2):
        x, y = np.full((rows, 3), rows, np.float32), np.zeros((rows, 3), np.float32)
        engine.bind({"x": HostBuffer(x), "y": HostBuffer(y)}).launch()
        np.testing.assert_array_equal(y, 2 * x)


def test_a_step_of_few_weights_has_a_model_for_the_first_shape_and_one_for_the_others(
    scaling: Path, compiled: list[str]
) -> None:
    run(scaling, urgent=True)
    assert compiled == ["[?,3]", "[2,3]"]


def test_other_graphs_are_compiled_once(scaling: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(scaling, urgent=False)
    assert compiled == ["[?,3]"]
    monkeypatch.setattr(backend, "_FEW_WEIGHTS", 0)
    run(scaling, urgent=True)
    assert compiled == ["[?,3]"] * 2
