"""Every key of every config, absent, null, of another type or absurd: one line that names the file and the key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engines.checkpoints.configs import SchedulerConfig, TextEncoderConfig, UnetConfig, VaeConfig
from engines.checkpoints.find import find_checkpoint
from engines.errors import CheckpointError
from tests.support.checkpoints import Families, edit

Configs = dict[str, type[BaseModel]]
CONFIGS: Configs = {
    "unet/config.json": UnetConfig,
    "vae/config.json": VaeConfig,
    "text_encoder/config.json": TextEncoderConfig,
    "scheduler/scheduler_config.json": SchedulerConfig,
}
SECOND: Configs = {"text_encoder_2/config.json": TextEncoderConfig}  # of a family with two text encoders
CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")


def keys_of(family: str, configs: Configs) -> list[tuple[str, str, str]]:
    return [
        (family, file, field.alias or name)
        for file, config in configs.items()
        for name, field in config.model_fields.items()
        if name not in {*CONDITIONS, "quantization_config"}
    ]


OF_TWO_ENCODERS = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
KEYS = [
    *keys_of("sd1", CONFIGS),
    *keys_of("xl", SECOND),
    *(("xl", "unet/config.json", key) for key in OF_TWO_ENCODERS),
]
REQUIRED = {("unet/config.json", "sample_size")}
NULLABLE = {
    *(
        ("unet/config.json", key)
        for key in (
            "mid_block_type",
            "num_attention_heads",
            "time_cond_proj_dim",
            "time_embedding_act_fn",
            "reverse_transformer_layers_per_block",
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        )
    ),
    ("unet/config.json", "_diffusers_version"),
    ("vae/config.json", "latents_mean"),
    ("vae/config.json", "latents_std"),
    ("scheduler/scheduler_config.json", "trained_betas"),
}
ABSURD: dict[type, Any] = {bool: 7, str: 7, int: 10**12, float: -1e30, list: [[]] * 999, type(None): -1e30}
NEEDED = {("xl", key) for key in OF_TWO_ENCODERS}
FILES = ("model_index.json", *CONFIGS, "tokenizer/vocab.json", "tokenizer/tokenizer_config.json")


PARTS = ("unet", "vae", "text_encoder", "scheduler")


def complaint(folder: Path) -> str | None:
    """The error of a checkpoint, which is one line; None where it is accepted."""
    try:
        find_checkpoint(str(folder))
    except CheckpointError as error:
        text = str(error)
        assert len(text.splitlines()) == 1
        assert len(text) < 500
        assert not any(word in text for word in ("pydantic", "Traceback", "hf.co", "huggingface", "from_pretrained"))
        return text
    return None


@pytest.fixture
def folder(families: Families, tmp_path: Path, family: str) -> Path:
    return Path(shutil.copytree(families(family), tmp_path / "copy"))


@pytest.mark.parametrize(("family", "file", "key"), KEYS)
def test_every_key(folder: Path, family: str, file: str, key: str) -> None:
    path = folder / file
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
    absent = complaint(folder)
    # Another default than the value that the tiny model has gives a config that does not fit the others.
    fits = ("do not fit each other", "should have", "make")
    assert absent is None or key in absent or any(words in absent for words in fits)
    if (file, key) in REQUIRED:
        assert absent
        assert f"{path}: {key} is missing" in absent
    for value in (None, {"a": 1}, ABSURD[type(whole.get(key))]):
        path.write_text(json.dumps(whole | {key: value}))
        found = complaint(folder)
        if value is None and (file, key) in NULLABLE and (family, key) not in NEEDED:
            assert found is None
        else:
            assert found
            assert file in found
            assert key in found


@pytest.mark.parametrize("key", ["_class_name", "text_encoder", "tokenizer", "unet", "vae"])
@pytest.mark.parametrize("value", [None, 7, [], ["diffusers"], {"a": 1}, "PNDMScheduler"])
def test_keys_of_the_index(copied: Path, key: str, value: object) -> None:
    edit(copied / "model_index.json", **{key: value})
    found = complaint(copied)
    assert found
    assert "model_index.json" in found
    assert key in found or (key == "_class_name" and "is a PNDMScheduler" in found)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b'{"a": "\xff"}', "cannot be read as JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "should hold a JSON object, and holds a list"),
        (b"null", "should hold a JSON object, and holds null"),
        (b'"text"', 'should hold a JSON object, and holds "text"'),
    ],
)
def test_files_that_hold_no_json_object(copied: Path, file: str, content: bytes, words: str) -> None:
    (copied / file).write_bytes(content)
    found = complaint(copied)
    assert found
    assert f"{copied / file} {words}" in found


def as_folder(path: Path) -> None:
    path.mkdir()


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("become", [None, as_folder, as_loop, as_fifo, as_large])
def test_what_is_no_file(copied: Path, file: str, become: Callable[[Path], None] | None) -> None:
    (copied / file).unlink()
    if become:
        become(copied / file)
    found = complaint(copied)
    if become is None and file.startswith("tokenizer/"):
        assert found is None  # tokenizer.json is there and suffices
    else:
        assert found
        assert str((copied / file).parent) in found
        assert Path(file).name in found


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer/vocab.json", {"a": "b"}, 'vocab.json: a should be a valid integer, not "b"'),
        ("tokenizer/tokenizer.json", {}, "tokenizer.json: model is missing"),
        ("tokenizer/tokenizer.json", {"model": {"vocab": [1]}}, "tokenizer.json: model.vocab should be"),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder should be"),
        ("unet/config.json", {"quantization_config": {"bits": 4}}, "unet/config.json: has a quantization_config"),
        (
            "text_encoder/config.json",
            {"quantization_config": {}},
            "text_encoder/config.json: has a quantization_config",
        ),
        ("unet/config.json", {"out_channels": 8}, "8 output channels (out_channels in unet/config.json)"),
        ("unet/config.json", {"in_channels": 8}, "8 input channels (editing"),
        ("unet/config.json", {"norm_num_groups": 7}, "7 does not divide 16"),
        ("unet/config.json", {"sample_size": [1, 2, 3]}, "sample_size should be a whole number, or height and width"),
        ("vae/config.json", {"out_channels": 4}, "vae/config.json: out_channels should be 3, not 4"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "5 does not divide 32"),
        (
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1]},
            "trained_betas should have 1000 entries, as num_train_timesteps says, and has 1",
        ),
    ],
)
def test_values_that_cannot_be_built(copied: Path, file: str, content: dict[str, Any], words: str) -> None:
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content if file.startswith(PARTS) else content))
    found = complaint(copied)
    assert found
    assert words in found


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", "vae", "text_encoder", "unet"])
def test_a_part_that_is_missing(copied: Path, part: str) -> None:
    (copied / part).rename(copied / "elsewhere")
    found = complaint(copied)
    assert found
    assert str(copied / part) in found


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder_2"])
def test_a_part_of_two_encoders_that_is_missing(copied_xl: Path, part: str) -> None:
    (copied_xl / part).rename(copied_xl / "elsewhere")
    found = complaint(copied_xl)
    assert found
    assert str(copied_xl / part) in found


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_tokenizer_that_is_incomplete(copied: Path, file: str) -> None:
    (copied / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (copied / "tokenizer" / file).unlink()
    found = complaint(copied)
    assert found
    assert "should hold tokenizer.json, or vocab.json and merges.txt, and holds" in found
