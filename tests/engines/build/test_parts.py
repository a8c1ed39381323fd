"""A model in parts computes what it computes in one piece, and its weights are widened a part at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engines.build.quantize
from engines.backends.openvino.package import openvino
from engines.build.parts import change_in_parts
from engines.build.quantize import quantize
from engines.contract import Array

OPS = openvino.opset13
CHANNELS = 8
LAYER = CHANNELS * CHANNELS
Inputs = Iterable[Mapping[str, Array]]


def parameter(name: str, shape: list[int]) -> Any:
    node = OPS.parameter(shape, np.float32, name=name)
    node.output(0).tensor.set_names({name})
    return node


def linear(node: Any, seed: int, width: int = CHANNELS) -> Any:
    """A layer of a transformer block, whose weights are stored in FP16."""
    values = np.random.default_rng(seed).random((width, width), np.float32) - 0.5
    weights = OPS.constant((values / np.sqrt(width)).astype(np.float16))
    weights.set_friendly_name(f"unet.transformer_blocks.{seed}.weight")
    return OPS.matmul(node, OPS.convert(weights, "f32"), False, True)


def unet() -> Any:
    """Six layers: the later half also reads, in reverse order, what the earlier half computes; and an input twice."""
    x, bias = parameter("x", [-1, CHANNELS]), parameter("bias", [])
    node, skips = OPS.add(x, bias), list[Any]()
    for seed in range(3):
        node = OPS.relu(linear(node, seed))
        skips.append(node)
    first = skips[0]
    for seed in range(3, 6):
        # Lengths are computed along the way, as exporters write them.
        node = OPS.reshape(linear(OPS.add(node, skips.pop()), seed), OPS.shape_of(x), special_zero=False)
    outputs = OPS.result(OPS.add(node, bias)), OPS.result(first)
    for output, name in zip(outputs, ("y", "same"), strict=True):
        output.output(0).tensor.set_names({name})
    return openvino.Model(list(outputs), [x, bias], "unet")


def calls(count: int = 2) -> list[dict[str, Array]]:
    random = np.random.default_rng(9)
    return [
        {
            "x": random.standard_normal((2 + call, CHANNELS), np.float32),
            "bias": np.float32(call) * np.ones((), np.float32),
        }
        for call in range(count)
    ]


def outputs(model: Any, inputs: Mapping[str, Array]) -> list[Array]:
    computed = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(dict(inputs))
    return [np.array(computed[place]) for place in range(len(model.outputs))]


class Parts:
    """A change that leaves everything as it is."""

    def __init__(self) -> None:
        self.models = list[Any]()
        self.samples = list[list[dict[str, Array]]]()

    def __call__(self, model: Any, samples: Inputs) -> Any:
        self.models.append(model.clone())
        self.samples.append([dict(one) for one in samples])
        return model


def test_it_computes_the_same(tmp_path: Path) -> None:
    expected = [outputs(unet(), inputs) for inputs in calls()]
    parts = Parts()
    model = change_in_parts(unet(), parts, calls(), max_weights=LAYER, folder=tmp_path)
    assert len(parts.models) == 6
    assert [port.any_name for port in model.inputs] == ["x", "bias"]
    assert [port.any_name for port in model.outputs] == ["y", "same"]
    assert model.get_friendly_name() == "unet"
    for inputs, known in zip(calls(), expected, strict=True):
        for actual, one in zip(outputs(model, inputs), known, strict=True):
            np.testing.assert_array_equal(actual, one)
    assert not list(tmp_path.iterdir())


def test_each_part_sees_what_those_before_it_compute_unchanged(tmp_path: Path) -> None:
    """Though its own outputs are changed."""
    plain, zeroed = Parts(), Parts()

    def to_zero(model: Any, samples: Inputs) -> Any:
        changed = zeroed(model, samples)
        for result in changed.get_results():
            source = result.input_value(0)
            result.input(0).replace_source_output(OPS.multiply(source, OPS.constant(np.float32(0))).output(0))
        return changed

    change_in_parts(unet(), plain, calls(), max_weights=2 * LAYER, folder=tmp_path)
    model = change_in_parts(unet(), to_zero, calls(), max_weights=2 * LAYER, folder=tmp_path)
    assert len(plain.samples) == len(zeroed.samples) > 2
    for part, other in zip(plain.samples, zeroed.samples, strict=True):
        assert [len(call) for call in part] == [len(call) for call in other]
        for one, two in zip(part, other, strict=True):
            for value, twin in zip(one.values(), two.values(), strict=True):
                np.testing.assert_array_equal(value, twin)
    assert not outputs(model, calls()[1])[0].any()


def test_it_is_cut_where_the_fewest_tensors_cross(tmp_path: Path) -> None:
    """Between residual blocks, not inside one."""
    node = x = parameter("x", [-1, CHANNELS])
    for seed in range(0, 8, 2):
        node = OPS.add(node, linear(OPS.relu(linear(node, seed)), seed + 1))
    parts = Parts()
    change_in_parts(
        openvino.Model([node], [x], ""), parts, [{"x": calls()[0]["x"]}], max_weights=3 * LAYER, folder=tmp_path
    )
    assert [len(model.inputs) for model in parts.models] == [1] * 4
    assert [len(model.outputs) for model in parts.models] == [1] * 4


def test_a_layer_above_the_limit_is_a_part_of_its_own(tmp_path: Path) -> None:
    parts = Parts()
    model = change_in_parts(unet(), parts, calls(), max_weights=1, folder=tmp_path)
    assert len(parts.models) >= 6
    for actual, one in zip(outputs(model, calls()[0]), outputs(unet(), calls()[0]), strict=True):
        np.testing.assert_array_equal(actual, one)


def test_a_small_model_stays_in_one_piece(tmp_path: Path) -> None:
    whole, parts = unet(), Parts()
    assert change_in_parts(whole, parts, calls(), max_weights=6 * LAYER, folder=tmp_path / "unused") is whole
    assert len(parts.models) == 1


def test_tensors_are_removed_after_a_failure(tmp_path: Path) -> None:
    def fail(_model: Any, samples: Inputs) -> Any:
        assert list(samples)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        change_in_parts(unet(), fail, calls(), max_weights=LAYER, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_quantized_in_parts_it_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tmp_path / "unet.xml"
    openvino.save_model(unet(), graph, compress_to_fp16=False)
    found = list[tuple[list[Array], list[Array]]]()
    for name, limit in (("whole", 6 * LAYER), ("parts", 2 * LAYER)):
        monkeypatch.setattr(engines.build.quantize, "MAX_WEIGHTS", limit)
        (tmp_path / name).mkdir()
        xml, _weights = quantize(graph, tmp_path / name, calls())
        model = openvino.Core().read_model(xml)
        found.append((outputs(model, calls()[1]), eight_bits(model)))
    (whole, weights), (parts, others) = found
    for one, two in zip([*whole, *weights], [*parts, *others], strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(weights) == 6


def eight_bits(model: Any) -> list[Array]:
    """The weights in INT8, in the order in which they are read."""
    constants = (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant")
    return [node.data.copy() for node in constants if node.get_element_type().get_type_name() in ("i8", "u8")]


QUANTIZING = """
import sys, threading
from pathlib import Path
import numpy as np
import nncf
import engines.build.quantize as module

def private():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

graph, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
module.MAX_WEIGHTS = limit
before, peak, ended = private(), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, private())

watcher = threading.Thread(target=watch)
watcher.start()
module.quantize(graph, out, [{"x": np.ones((2, 1024), np.float32)}])
ended.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's count of private pages")
def test_memory_holds_the_widened_weights_of_one_part(tmp_path: Path) -> None:
    """In one piece it is nine bytes for each weight: FP32 twice, of which kernels read one, and INT8."""
    layers, width = 32, 1024
    node = x = parameter("x", [-1, width])
    for seed in range(layers):
        node = linear(node, seed, width)
    graph = tmp_path / "wide.xml"
    openvino.save_model(openvino.Model([node], [x], "wide"), graph, compress_to_fp16=False)
    weights = layers * width * width
    command = [sys.executable, "-c", QUANTIZING, str(graph), str(tmp_path), str(weights // 8)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    assert int(done.stdout) < 4 * weights
