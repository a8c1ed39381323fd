"""A checkpoint's safety checker is a part of the build where it is whole, and what is wrong with it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engines.build.compile import engine_precisions
from engines.checkpoints.checkpoint import Checkpoint, count_parameters
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.safety_checker import Preprocessing, read_preprocessing
from engines.contract import GRAPHS, STEPS
from engines.errors import CheckpointError
from tests.support.checkpoints import load
from tests.support.tiny import edit_index

WEIGHTS = "safety_checker/model.safetensors"
CLIP = Preprocessing(
    224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)  # as published with Stable Diffusion


@pytest.fixture
def folder(checked_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checked_checkpoint, tmp_path / "copy"))


def preprocessor(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(content))


def test_it_is_one_more_graph(folder: Path) -> None:
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint.graphs == (*GRAPHS, "safety")
    assert not checkpoint.not_followed
    assert count_parameters(checkpoint)["safety"] == sum(one.numel() for one in load_file(folder / WEIGHTS).values())


def test_it_can_be_left_out(folder: Path) -> None:
    checkpoint = find_checkpoint(str(folder), with_safety_checker=False)
    assert checkpoint.graphs == GRAPHS
    assert not checkpoint.not_followed
    assert checkpoint.source != find_checkpoint(str(folder)).source


def test_it_is_a_part_of_what_is_built(folder: Path) -> None:
    source = find_checkpoint(str(folder)).source
    preprocessor(folder, {"size": 30, "crop_size": 28})
    assert find_checkpoint(str(folder)).source != source


def test_a_checkpoint_without_one_is_the_same_as_ever(checkpoint: Path) -> None:
    kept, left = (find_checkpoint(str(checkpoint), with_safety_checker=with_it) for with_it in (True, False))
    assert kept.source == left.source
    assert kept.graphs == GRAPHS


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "safety_checker"), "lacks files"),
        (lambda folder: shutil.rmtree(folder / "feature_extractor"), "lacks files"),
        (lambda folder: (folder / WEIGHTS).unlink(), "lacks files"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "safety_checker/pytorch_model.bin"), "--allow-pickle"),
        (lambda folder: edit_index(folder, safety_checker=["diffusers", "OtherChecker"]), "OtherChecker is not"),
    ],
)
def test_one_that_cannot_be_built_is_said_so(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    checkpoint = find_checkpoint(str(folder))
    assert checkpoint.graphs == GRAPHS
    (said,) = checkpoint.not_followed
    assert "images are not checked" in said
    assert words in said


def test_weights_are_read_under_the_names_they_were_published_with(folder: Path) -> None:
    """transformers 5.6 has one level less than the checkpoints of 2022."""
    new = load(find_checkpoint(str(folder)))
    weights = {
        f"vision_model.{name}" if name.startswith("vision_model.") else name: weight
        for name, weight in load_file(folder / WEIGHTS).items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    old = load(find_checkpoint(str(folder)))
    assert new.safety_checker
    assert old.safety_checker
    for name, weight in old.safety_checker.module.state_dict().items():
        assert weight.equal(new.safety_checker.module.state_dict()[name])


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3},
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "rescale_factor": 0.003921569},
    ],
)
def test_every_published_form_is_read(folder: Path, content: Mapping[str, Any]) -> None:
    preprocessor(folder, content)
    assert read_preprocessing(Checkpoint("copy", folder).config) == CLIP


@pytest.mark.parametrize(
    "content",
    [
        {"resample": 2},
        {"do_center_crop": False},
        {"size": {"height": 224, "width": 224}},
        {"crop_size": {"height": 224, "width": 200}},
        {"size": 100, "crop_size": 224},
        {"rescale_factor": 1.0},
        {"image_std": [0.2, 0.2, 0]},
        {"size": True},
    ],
)
def test_what_is_not_followed_stops_the_build(folder: Path, content: Mapping[str, Any]) -> None:
    preprocessor(folder, content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json.*--no-safety-checker"):
        find_checkpoint(str(folder))


def test_its_verdicts_are_not_quantized() -> None:
    def precision(backend: str, wanted: Any, *, exceeding: Any = ()) -> str:
        chosen = engine_precisions(backend, wanted, exceeding=exceeding, graphs=(*GRAPHS, "safety"))
        return chosen["safety"]

    assert precision("openvino", "int8") == precision("openvino", "bf16") == precision("onnxruntime", None) == "fp32"
    assert precision("tensorrt", None) == precision("tensorrt", None, exceeding=STEPS) == "fp16"
