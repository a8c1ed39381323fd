"""FP8 and INT8 for TensorRT are of the UNet, from graphs in FP16, and each stage of making them is announced."""

from __future__ import annotations

import pytest

from engines.backends.registry import TENSORRT
from engines.build.compile import engine_precisions, required_dtypes
from engines.build.outline import compile_stages
from engines.build.qdq.quantize import EIGHT_BITS, EightBits
from engines.contract import ALL_GRAPHS, LORA_GRAPHS, PLAIN_STEPS
from engines.errors import EngineError


@pytest.mark.parametrize("backend", TENSORRT)
@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_the_unet_is_quantized_and_the_rest_is_in_fp16(backend: str, precision: EightBits) -> None:
    chosen = engine_precisions(backend, precision, prefers_bf16=False, graphs=ALL_GRAPHS)
    assert chosen == {name: precision if name in PLAIN_STEPS else "fp16" for name in ALL_GRAPHS}
    dtypes = required_dtypes(backend, precision, prefers_bf16=False)
    assert {dtype for _name, dtype in dtypes} == {"fp16"}


def test_on_a_cpu_verdicts_and_loras_stay_in_fp32() -> None:
    chosen = engine_precisions("openvino", "int8", prefers_bf16=False, graphs=ALL_GRAPHS)
    exact = ("safety", *LORA_GRAPHS.values())
    assert chosen == {name: "fp32" if name in exact else "int8" for name in ALL_GRAPHS}


def test_steps_with_loras_are_in_bf16_as_others_are() -> None:
    for backend in ("openvino", "tensorrt"):
        chosen = engine_precisions(backend, "bf16", prefers_bf16=True, graphs=ALL_GRAPHS)
        assert all(chosen[variant] == chosen[name] for name, variant in LORA_GRAPHS.items())


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_a_model_that_exceeds_fp16_is_told_bf16(precision: EightBits) -> None:
    with pytest.raises(EngineError, match="--precision bf16"):
        engine_precisions("tensorrt", precision, prefers_bf16=True)


def test_its_stages_are_announced_in_order() -> None:
    precisions = engine_precisions("tensorrt_rtx", "fp8", prefers_bf16=False)
    assert list(compile_stages("tensorrt_rtx", precisions, verify=False)) == [
        "compiling encode_prompt for tensorrt_rtx",
        "recording trajectories to calibrate on",
        "quantizing denoise to fp8",
        "comparing denoise in fp8 with FP32 on the CPU",
        "compiling denoise for tensorrt_rtx",
        "quantizing denoise_shallow to fp8",
        "comparing denoise_shallow in fp8 with FP32 on the CPU",
        "compiling denoise_shallow for tensorrt_rtx",
        "compiling decode for tensorrt_rtx",
        "compiling encode_image for tensorrt_rtx",
    ]
    openvino = engine_precisions("openvino", "int8", prefers_bf16=False)
    assert list(compile_stages("openvino", openvino, verify=False))[:3] == [
        "quantizing encode_prompt",
        "recording trajectories to calibrate on",
        "quantizing denoise",
    ]
