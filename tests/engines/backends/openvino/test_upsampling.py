"""Upsampling at the lower resolution computes what it computed at the higher one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from engines.backends.openvino.package import openvino
from engines.backends.openvino.upsampling import at_low_resolution
from engines.contract import Array

ops = openvino.opset13
IMAGE = np.random.default_rng(0).standard_normal((2, 4, 6, 10), np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((5, 4, 3, 3), np.float32)
BIAS = np.arange(5, dtype=np.float32)


def doubled(image: Any, *, mode: str = "nearest", scale: float = 2.0) -> Any:
    scales, axes = np.array([scale, scale], np.float32), np.array([2, 3])
    return ops.interpolate(
        image, scales, mode, "scales", axes=axes, coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def convolved(image: Any, weights: Any = WEIGHTS, *, stride: int = 1) -> Any:
    return ops.convolution(image, weights, [stride, stride], [1, 1], [1, 1], [1, 1])


def parameter() -> Any:
    return ops.parameter([-1, 4, -1, -1], np.float32)


def run(model: openvino.Model) -> Array:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made: Array = compiled(IMAGE)[0]
    return made


def kinds(model: openvino.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def with_bias(image: Any) -> Any:
    return ops.add(convolved(image), BIAS.reshape(1, 5, 1, 1))


def with_stored_in_fp16(image: Any) -> Any:
    return convolved(image, ops.convert(ops.constant(WEIGHTS.astype(np.float16)), "f32"))


@pytest.mark.parametrize("layer", [convolved, with_bias, with_stored_in_fp16])
def test_it_computes_the_same_by_fewer_products(layer: Any) -> None:
    image = parameter()
    model = openvino.Model([ops.relu(layer(doubled(image)))], [image])
    exact = run(model)
    lowered = at_low_resolution(model)
    assert kinds(lowered)["Interpolate"] == 0
    kernels = [node.get_input_shape(1) for node in lowered.get_ops() if node.get_type_name() == "Convolution"]
    assert list(map(list, kernels)) == [[5, 4, 2, 2]] * 4
    assert exact.shape == (2, 5, 12, 20)
    np.testing.assert_allclose(run(lowered), exact, atol=1e-5)


def test_the_kernels_are_made_by_whoever_is_asked() -> None:
    image, made = parameter(), list[Array]()
    model = openvino.Model([convolved(doubled(image))], [image])

    def constant(values: Array) -> Any:
        made.append(values)
        return ops.constant(values)

    at_low_resolution(model, constant)
    assert sum(values.size for values in made) == WEIGHTS.size * 16 // 9


@pytest.mark.parametrize(
    "layer",
    [
        lambda image: convolved(doubled(image, mode="linear_onnx")),
        lambda image: convolved(doubled(image, scale=3.0)),
        lambda image: convolved(doubled(image), stride=2),
    ],
    ids=["other interpolation", "other scale", "stride"],
)
def test_what_is_no_doubling_before_a_convolution_stays(layer: Any) -> None:
    image = parameter()
    model = openvino.Model([layer(image)], [image])
    exact = run(model)
    np.testing.assert_array_equal(run(at_low_resolution(model)), exact)


def test_a_doubling_that_others_read_stays() -> None:
    image = parameter()
    larger = doubled(image)
    model = openvino.Model([convolved(larger), ops.relu(larger)], [image])
    assert kinds(at_low_resolution(model))["Interpolate"] == 1
