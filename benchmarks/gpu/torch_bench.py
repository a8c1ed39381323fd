"""Measures PyTorch on the same images: diffusers' pipeline, eager and with a compiled UNet.

The only module here that imports torch to measure; it is imported only for those stages.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.figures import Batch, Latencies, Peak
from benchmarks.gpu.options import GpuBenchCommand
from engines.errors import EngineError
from loadtest.analysis.statistics import Spread

_SIDE = 8192
_PRODUCTS, _ROUNDS = 50, 5
_BATCH_MODE = "reduce-overhead"  # trying kernels takes minutes for each batch size
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_DTYPE = torch.float16 if _DEVICE == "cuda" else torch.float32
_PRECISION = {torch.float16: "fp16", torch.float32: "fp32"}


def measure_peak() -> Peak:
    """The rate of large FP16 matrix products: the best of a few rounds. Raises EngineError without a GPU."""
    _require_gpu()
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = min(_time_products(a, b, out) for _ in range(_ROUNDS + 1))  # the first warms up
    return Peak(flops=2 * _SIDE**3 / seconds, side=_SIDE, dtype="fp16")


def _time_products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(_PRODUCTS):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    seconds: float = begin.elapsed_time(end) / 1000
    return seconds / _PRODUCTS


def measure_eager(checkpoint: Path, steps: Sequence[int], runs: int) -> Latencies:
    """diffusers unchanged, one guided image at a time."""
    with _loaded(checkpoint) as pipeline:
        return _latencies(pipeline, steps, runs)


def measure_compiled(checkpoint: Path, steps: Sequence[int], runs: int) -> Latencies:
    """The same with the UNet under torch.compile, which takes minutes. Raises EngineError without a GPU."""
    _require_gpu()
    with _loaded(checkpoint) as pipeline, _compiled(pipeline, "max-autotune"):
        return _latencies(pipeline, steps, runs)


def measure_batch(checkpoint: Path, rows: int, options: GpuBenchCommand, *, compiled: bool) -> Batch:
    """Calls with as many guided images as fill `rows`, channels last; compiled without trying many kernels.

    Raises:
        EngineError: the GPU's memory is full; or compiled, without a GPU.
    """
    if compiled:
        _require_gpu()
    steps, images = min(options.steps), max(rows // 2, 1)
    with _loaded(checkpoint) as pipeline, _memory_told(), _compiled(pipeline, _BATCH_MODE if compiled else ""):
        first = _generate(pipeline, steps, images)
        _generate(pipeline, steps, images)
        seconds = [_generate(pipeline, steps, images)]
        while sum(seconds) < options.seconds or len(seconds) < 2:
            seconds.append(_generate(pipeline, steps, images))
    return Batch(
        precision=_PRECISION[_DTYPE],
        rows=2 * images,
        steps=steps,
        seconds=Spread(values=tuple(seconds)),
        first=first,
        mode=_BATCH_MODE if compiled else "",
    )


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(f"The GPU's memory is full: {str(error).partition('. ')[0]}.") from error


@contextmanager
def _compiled(pipeline: Any, mode: str) -> Iterator[None]:
    """Channels last, and the UNet compiled unless `mode` is empty."""
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if mode:
        pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
    try:
        yield
    finally:
        torch.compiler.reset()


@contextmanager
def _loaded(checkpoint: Path) -> Iterator[Any]:
    """The pipeline on the GPU in FP16, or on the CPU in FP32; its memory is free again afterwards."""
    from engines.checkpoints.loading.libraries import quiet  # noqa: PLC0415 - imports diffusers, not needed by all

    with quiet():
        from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: PLC0415 - logs remarks on optional packages

        pipeline = StableDiffusionPipeline.from_pretrained(
            checkpoint, torch_dtype=_DTYPE, local_files_only=True, safety_checker=None, requires_safety_checker=False
        ).to(_DEVICE)
        # one UNet call per step, as ours
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
        try:
            yield pipeline
        finally:
            del pipeline
            gc.collect()
            if _DEVICE == "cuda":
                torch.cuda.empty_cache()


def _latencies(pipeline: Any, steps: Sequence[int], runs: int) -> Latencies:
    first = _generate(pipeline, min(steps))
    _generate(pipeline, min(steps))
    by_steps = {count: Spread(values=tuple(_generate(pipeline, count) for _ in range(runs))) for count in steps}
    return Latencies(precision=_PRECISION[_DTYPE], first=first, by_steps=by_steps)


def _generate(pipeline: Any, steps: int, images: int = 1) -> float:
    """Seconds from the request to the images' pixels."""
    _synchronize()
    began = time.perf_counter()
    pipeline(
        "a photograph of a lighthouse on a rock in the sea",
        num_inference_steps=steps,
        guidance_scale=7.5,
        num_images_per_prompt=images,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    )
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def _require_gpu() -> None:
    if _DEVICE != "cuda":
        raise EngineError("torch finds no GPU.")
