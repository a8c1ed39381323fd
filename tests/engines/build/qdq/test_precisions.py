"""FP8 and INT8 for TensorRT are of the UNet, from graphs in FP16, and each stage of making them is announced."""

from __future__ import annotations

import pytest

from engines.backends.registry import TENSORRT
from engines.build.compile import engine_precisions, required_dtypes
from engines.build.outline import compile_stages
from engines.build.qdq.quantize import EIGHT_BITS, EightBits
from engines.contract import ALL_GRAPHS, LORA_GRAPHS, PLAIN_STEPS, STEPS, VAE_GRAPHS
from engines.errors import EngineError
from engines.manifest import Precision


@pytest.mark.parametrize("backend", TENSORRT)
@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_the_unet_is_quantized_and_the_rest_is_in_fp16(backend: str, precision: EightBits) -> None:
    chosen = engine_precisions(backend, precision, graphs=ALL_GRAPHS)
    assert chosen == {name: precision if name in PLAIN_STEPS else "fp16" for name in ALL_GRAPHS}
    dtypes = required_dtypes(backend, precision)
    assert {dtype for _name, dtype in dtypes} == {"fp16"}


def test_on_a_cpu_verdicts_and_loras_stay_in_fp32() -> None:
    chosen = engine_precisions("openvino", "int8", graphs=ALL_GRAPHS)
    exact = ("safety", *LORA_GRAPHS.values())
    assert chosen == {name: "fp32" if name in exact else "int8" for name in ALL_GRAPHS}


def test_steps_with_loras_are_in_bf16_as_others_are() -> None:
    for backend in ("openvino", "tensorrt"):
        chosen = engine_precisions(backend, "bf16", exceeding=STEPS, graphs=ALL_GRAPHS)
        assert all(chosen[variant] == chosen[name] for name, variant in LORA_GRAPHS.items())


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_a_model_that_exceeds_fp16_is_told_bf16(precision: EightBits) -> None:
    with pytest.raises(EngineError, match="--precision bf16"):
        engine_precisions("tensorrt", precision, exceeding=STEPS)


@pytest.mark.parametrize("precision", [None, "fp16", "bf16", *EIGHT_BITS])
def test_a_vae_that_exceeds_fp16_computes_in_bf16_beside_any_unet(precision: Precision | None) -> None:
    plain = engine_precisions("tensorrt_rtx", precision, graphs=ALL_GRAPHS)
    chosen = engine_precisions("tensorrt_rtx", precision, exceeding=VAE_GRAPHS, graphs=ALL_GRAPHS)
    assert chosen == {**plain, "decode": "bf16", "encode_image": "bf16"}
    dtypes = required_dtypes("tensorrt_rtx", precision, exceeding=VAE_GRAPHS)
    assert {name for name, dtype in dtypes if dtype == "bf16"} >= set(VAE_GRAPHS)


def test_a_backend_without_bf16_decodes_such_a_vae_in_fp32() -> None:
    chosen = engine_precisions("onnxruntime_cuda", None, exceeding=VAE_GRAPHS)
    assert {name for name, precision in chosen.items() if precision == "fp32"} == set(VAE_GRAPHS)
    assert {precision for name, precision in chosen.items() if name not in VAE_GRAPHS} == {"fp16"}


@pytest.mark.parametrize("precision", [None, "int8", "bf16"])
def test_on_a_cpu_its_precisions_are_those_of_others(precision: Precision | None) -> None:
    others = engine_precisions("openvino", precision)
    assert engine_precisions("openvino", precision, exceeding=VAE_GRAPHS) == others


def test_its_stages_are_announced_in_order() -> None:
    precisions = engine_precisions("tensorrt_rtx", "fp8")
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
    openvino = engine_precisions("openvino", "int8")
    assert list(compile_stages("openvino", openvino, verify=False))[:3] == [
        "quantizing encode_prompt",
        "recording trajectories to calibrate on",
        "quantizing denoise",
    ]
