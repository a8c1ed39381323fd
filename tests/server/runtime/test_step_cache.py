"""A server that does without the step cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends.registry import open_device
from engines.manifest import FeatureDrift, Manifest
from server.requests.depths import Cache, StepCache
from server.requests.errors import InvalidRequest
from server.requests.intake import Intake
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import PromptTokenizer
from server.runtime.batching.step_times import StepTimeModel
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.pieces import at_once
from server.runtime.pipeline.pipeline import Pipeline
from server.runtime.pipeline.streams import Streams
from tests import ROOT

DEMO = ROOT / "engines" / "demo"
SMALL = np.dtype(np.float16).itemsize * 64 * 16 * 16  # bytes of the features of one row of the demo


def loaded(*, step_cache: bool) -> tuple[set[str], dict[str, int], StepTimeModel]:
    """The files that were read, the memory in use after the warm-up, and the times that it measured."""
    read = set[str]()

    def reader(path: Path) -> bytes:
        read.add(path.name)
        return path.read_bytes()

    manifest, device = Manifest.read(DEMO), open_device("onnxruntime", threads=1)
    times = StepTimeModel(max_rows=manifest.max_rows)
    loading = Pipeline.load(
        manifest,
        DEMO,
        backend="onnxruntime",
        device=device,
        streams=Streams.open(device, "equal"),
        step_times=times,
        trace=Trace(),
        step_cache=step_cache,
        read=reader,
    )
    pipeline = at_once(loading)
    at_once(pipeline.warm_up(lambda _stage: None))
    return read, dict(device.memory()), times


def test_without_it_neither_its_engine_nor_its_features_are_there() -> None:
    read, memory, times = loaded(step_cache=False)
    assert "denoise.onnx" in read
    assert "denoise_shallow.onnx" not in read
    assert "features of 64x64" not in memory
    assert memory["features of steps"] == 16 * SMALL
    assert {depth for _size, depth in times.curves()} == {"full"}


def test_with_it_features_of_every_row_are_kept_in_fp16() -> None:
    read, memory, times = loaded(step_cache=True)
    assert "denoise_shallow.onnx" in read
    assert memory["features of 64x64"] == 17 * SMALL
    assert memory["features of steps"] == 16 * SMALL
    assert {depth for _size, depth in times.curves()} == {"full", "shallow"}


@pytest.mark.parametrize(
    ("setting", "asked", "expected"),
    [
        ("off", None, "off"),
        ("fast", None, "fast"),
        ("faster", None, "faster"),
        ("off", "fast", "fast"),
        ("fast", "faster", "faster"),
        ("faster", "off", "off"),
        ("disabled", None, "off"),
        ("disabled", "off", "off"),
    ],
)
def test_the_cache_of_a_request(setting: StepCache, asked: Cache | None, expected: Cache) -> None:
    assert intake(setting).request(GenerateRequest(prompt="a", cache=asked)).params.cache == expected


@pytest.mark.parametrize("asked", ["fast", "faster"])
def test_a_request_for_it_is_refused_where_there_is_none(asked: Cache) -> None:
    with pytest.raises(InvalidRequest, match="leave out cache, or set it to off") as refused:
        intake("disabled").request(GenerateRequest(prompt="a", cache=asked))
    assert [error.field for error in refused.value.fields] == ["cache"]


def test_full_steps_are_at_most_the_steps() -> None:
    body = GenerateRequest(prompt="a", num_inference_steps=8, full_steps=9)
    with pytest.raises(InvalidRequest, match="There are 8 denoising steps: compute 1 to 8 of them in full") as refused:
        intake("off").request(body)
    assert [error.field for error in refused.value.fields] == ["full_steps"]
    assert intake("off").request(body.model_copy(update={"full_steps": 8})).params.full_steps == 8


def test_shallow_steps_are_refused_where_there_are_none() -> None:
    body = GenerateRequest(prompt="a", num_inference_steps=8, full_steps=7)
    with pytest.raises(InvalidRequest, match="without the step cache: leave out full_steps"):
        intake("disabled").request(body)
    assert not intake("disabled").request(body.model_copy(update={"full_steps": 8})).params.reuses_features


def test_full_steps_are_placed_by_the_models_own_features() -> None:
    late = FeatureDrift(log_snr=(-10, 0, 1, 2), total=(0, 0, 1, 9))
    own = intake("fast", Manifest.read(DEMO).model_copy(update={"feature_drift": late}))
    body = GenerateRequest(prompt="a", num_inference_steps=20)
    mine, demos = own.request(body).depths, intake("fast").request(body).depths
    assert mine.count("full") == demos.count("full") == 6
    assert mine.index("full", 1) > demos.index("full", 1)


def intake(cache: StepCache, manifest: Manifest | None = None) -> Intake:
    manifest = manifest or Manifest.read(DEMO)
    path = DEMO / manifest.tokenizer.file.path
    tokenizer = PromptTokenizer(
        path,
        content=path.read_bytes(),
        tokens=manifest.context.tokens,
        pad=manifest.tokenizer.pad,
        embeddings=manifest.tokenizer.embeddings,
    )
    return Intake(manifest, tokenizer, cache=cache)
