"""Files that requests cannot use are refused in one line that says why and what to do; nothing harms the reader."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engines.errors import CheckpointError
from engines.lora.pack import inspect_lora, pack_lora
from engines.manifest import LoraCapacity, Manifest
from tests.support.loras import make_changes, shapes_in, write_lora

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
Tensors = Mapping[str, torch.Tensor]


def refused(path: Path, manifest: Manifest) -> str:
    """Why a file cannot be packed, which its header shows as well."""
    with pytest.raises(CheckpointError) as raised:
        pack_lora(path, manifest)
    message = str(raised.value).replace(str(path), path.name)
    assert message.isprintable()
    assert inspect_lora(path, manifest).refusal == message
    return message


def pair(out: int = 16, rank: int = 4, width: int = 16, layer: str = QUERY, kernel: int = 0) -> dict[str, torch.Tensor]:
    one, square = ([1, 1], [kernel, kernel]) if kernel else ([], [])
    return {
        f"{layer}.lora_up.weight": torch.ones(out, rank, *one),
        f"{layer}.lora_down.weight": torch.ones(rank, width, *square),
    }


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (
            pair(layer=CONV, kernel=3),
            r"updates the convolution down_blocks\.0\.resnets\.0\.conv1, as LoCon does, .*: choose a LoRA without .*, "
            r"or fuse it into the model \(build_engines\.py --lora\)",
        ),
        (
            pair(rank=2) | {f"{QUERY}.lora_mid.weight": torch.ones(2, 2, 1, 1)},
            r"has three factors in the layer down_blocks.*attn1\.to_q, which LoRAs of requests cannot have: fuse it",
        ),
        (
            pair(rank=9),
            r"has rank 9 in the layer \S+, and this model takes LoRAs of rank 8 at most: resize it .*--lora-rank 9",
        ),
        (
            pair(out=32),
            r"does not fit the shape of the layer \S+: its update is 32x16, the weight 16x16",
        ),
        (pair(width=48), r"its update is 16x48, the weight 16x16"),
        (pair(kernel=3), r"its update is 16x144, the weight 16x16"),
        (
            pair() | {f"{QUERY}.alpha": torch.ones(2)},
            r"does not fit the shape of its own factors .*alpha \[2\].*damaged",
        ),
        (pair(rank=0), r"does not fit the shape of its own factors in the layer \S+ \(down \[0, 16\], up \[16, 0\]\)"),
        (
            {f"{QUERY}.lora_up.weight": torch.ones(()), f"{QUERY}.lora_down.weight": torch.ones(())},
            r"own factors in the layer \S+ \(down \[\], up \[\]\)",
        ),
        ({f"{QUERY}.lora_down.weight": torch.ones(4, 16)}, r"lacks the factor up of the layer \S+: it is incomplete"),
        ({f"{QUERY}.alpha": torch.ones(())}, r"is not a LoRA|holds no factors of a LoRA: it is empty"),
        (
            pair(layer="lora_unet_\n\x1b[31m\u202egone"),
            r"holds lora_unet_ \[31m gone\.lora_(up|down)\.weight, which is not a known factor of a LoRA",
        ),
        (pair() | {f"{QUERY}.bias": torch.ones(16)}, rf"holds {QUERY}\.bias, which is not a known factor of a LoRA"),
        (pair() | {f"{QUERY}.dora_scale": torch.ones(16)}, r"is a DoRA, .*Supported: LoRAs for Stable Diffusion 1\.x"),
        ({f"{QUERY}.hada_w1_a": torch.ones(4, 4)}, "is a LoHa, not a LoRA .merge it"),
        ({f"{QUERY}.lokr_w1": torch.ones(4, 4)}, "is a LoKr, not a LoRA .merge it"),
        (pair(layer="lora_te2_text_model_encoder_layers_0_mlp_fc1"), "is a LoRA for Stable Diffusion XL"),
        (pair(layer="lora_unet_double_blocks_0_img_attn_qkv"), "is a LoRA for a diffusion transformer"),
        (
            pair(width=2048, layer=QUERY.replace("attn1_to_q", "attn2_to_k")),
            r"for Stable Diffusion XL, with prompt embeddings 2048 wide, and those of \S+ are 32 wide",
        ),
        ({"conv_in.weight": torch.ones(4, 4)}, "is not a LoRA: none of its tensors is named like one"),
        (
            {
                f"unet.mid_block.attentions.0.proj_in.lora_{factor}.{name}.weight": torch.ones(32, 32)
                for factor in "AB"
                for name in ("cat", "dog")
            },
            r"holds several adapters \(cat, dog\): save each to a file of its own",
        ),
        (
            {
                f"base_model.model.mid_block.attentions.0.proj_in.lora_{factor}.weight": torch.ones(8, 8)
                for factor in "AB"
            },
            r"was written by PEFT, .* download adapter_config\.json to the same folder",
        ),
    ],
)
def test_what_a_model_cannot_use_is_refused_by_its_header(
    lora_manifest: Manifest, tmp_path: Path, tensors: Tensors, why: str
) -> None:
    save_file(dict(tensors), tmp_path / "style.safetensors")
    message = refused(tmp_path / "style.safetensors", lora_manifest)
    assert re.search(why, message), message
    assert message.startswith("style.safetensors ")


def test_a_file_with_nothing_is_refused(lora_manifest: Manifest, tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert "is not a LoRA" in refused(tmp_path / "a.safetensors", lora_manifest)


def test_a_model_without_places_for_loras_takes_none(lora_manifest: Manifest, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "a.safetensors")
    message = refused(tmp_path / "a.safetensors", lora_manifest.model_copy(update={"lora": None}))
    assert "was built without LoRAs of requests: build it again with --lora-slots" in message


@pytest.mark.parametrize(
    ("up", "why"),
    [
        (math.nan, rf"holds NaN or infinity in {QUERY}\.lora_up\.weight: it is damaged\. Download it again"),
        (-math.inf, "holds NaN or infinity"),
        (3e38, r"updates the layer \S+\.attn1\.to_q by more than FP16 holds: it is damaged"),
    ],
)
def test_values_that_no_lora_has_name_their_layer(lora_manifest: Manifest, tmp_path: Path, up: float, why: str) -> None:
    tensors = pair()
    tensors[f"{QUERY}.lora_up.weight"][1, 2] = up
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=why):
        pack_lora(tmp_path / "a.safetensors", lora_manifest)


def test_a_rank_beyond_the_pool_is_refused_before_it_is_unpacked(lora_manifest: Manifest, tmp_path: Path) -> None:
    save_file(pair(rank=4), tmp_path / "a.safetensors")
    smaller = lora_manifest.model_copy(update={"lora": LoraCapacity(slots=1, rank=2)})
    assert "rank 4" in refused(tmp_path / "a.safetensors", smaller)


def test_learned_tokens_are_a_warning_unless_the_model_knows_them(lora_manifest: Manifest, tmp_path: Path) -> None:
    made = make_changes(shapes_in(lora_manifest), seed=1)
    path = write_lora(tmp_path / "a.safetensors", made, metadata={"<s1>": "<embed>", "<s2>": "<embed>"})
    tokens = {"<s1>": torch.ones(32), "<s2>": torch.ones(32)}
    save_file({**load_file(path), **tokens}, path, metadata={"<s1>": "<embed>", "<s2>": "<embed>"})
    packed = pack_lora(path, lora_manifest)
    assert packed.info.tokens == ("<s1>", "<s2>")
    assert packed.info.warning == (
        "a.safetensors was trained with the tokens <s1> <s2>, which prompts do not have: build the model with "
        "--embedding a.safetensors to use them."
    )
    tokenizer = lora_manifest.tokenizer.model_copy(update={"embeddings": {"<s1>": 1, "<s2>": 1}})
    known = lora_manifest.model_copy(update={"tokenizer": tokenizer})
    assert (inspect_lora(path, known).tokens, inspect_lora(path, known).warning) == ((), "")


# Files that are not what they seem


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty: download it again"),
        (b"abc", "is not a .safetensors file, or is damaged"),
        (pickle.dumps({"a": [1] * 20}, protocol=2), "is a pickle by another name"),
        (b"PK\x03\x04" + bytes(100), "is a pickle (or another zip archive)"),
        (b"<!DOCTYPE html><html>" + bytes(100), "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ((2**62).to_bytes(8, "little") + b"{}", "its header alone has"),
        ((20 << 20).to_bytes(8, "little") + b"{" + bytes(20 << 20), "header too large"),
        ((50_000).to_bytes(8, "little") + b'{"a":' * 10_000, "damaged"),
    ],
)
def test_other_files_by_this_name_are_explained(
    lora_manifest: Manifest, tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert why in refused(path, lora_manifest)


def test_pipes_folders_and_missing_files_are_refused_and_links_followed(
    lora_manifest: Manifest, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder"):
        assert "is not a file" in refused(tmp_path / f"{name}.safetensors", lora_manifest)
    assert "does not exist" in refused(tmp_path / "none.safetensors", lora_manifest)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "none.safetensors")
    assert "does not exist" in refused(tmp_path / "dangling.safetensors", lora_manifest)
    save_file(pair(), tmp_path / "real")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real")
    assert len(pack_lora(tmp_path / "link.safetensors", lora_manifest).values) == 4


def test_a_file_that_was_cut_short_is_refused_wherever_it_was_cut(lora_manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(pair(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, lora_manifest)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_or_a_lora_never_anything_else(
    lora_manifest: Manifest, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes of the header and of the data at random places become others."""
    path = tmp_path / "a.safetensors"
    save_file(pair() | {f"{QUERY}.alpha": torch.tensor(4.0)}, path, metadata={"lora_adapter_metadata": '{"r": 4}'})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    _only_checkpoint_errors(path, lora_manifest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SPEC = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "F7"]) | JSON, "shape": JSON, "data_offsets": JSON}
)
KEYS = st.sampled_from([f"{QUERY}.lora_up.weight", f"{QUERY}.lora_down.weight", "__metadata__", "unet:0:up"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(KEYS, SPEC | JSON, max_size=4) | JSON)
@example(header={"__metadata__": {"a": 1}})
@example(header={f"{QUERY}.lora_up.weight": {"dtype": "F32", "shape": [-1, -16], "data_offsets": [0, 64]}})
def test_any_json_for_a_header_is_an_error_or_a_lora(lora_manifest: Manifest, tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    _only_checkpoint_errors(path, lora_manifest)


def _only_checkpoint_errors(path: Path, manifest: Manifest) -> None:
    refusal = inspect_lora(path, manifest).refusal
    assert refusal.isprintable()
    try:
        packed = pack_lora(path, manifest)
    except CheckpointError as error:
        lines = str(error).splitlines()
    else:
        lines = [refusal]
        assert not refusal
        assert np.isfinite(packed.values).all()
    assert len(lines) == 1


@pytest.mark.parametrize(
    "config",
    [
        "[1]",
        "{",
        '{"lora_alpha": 1e999}',
        '{"lora_alpha": 1' + "0" * 400 + "}",
        '{"alpha_pattern": {"(a+)+$": 1}}',
        '{"alpha_pattern": {".*.*.*.*x": 1}}',
        json.dumps({"alpha_pattern": {"x" * 300: 1}}),
        json.dumps({"alpha_pattern": {f"layer{n}": 1 for n in range(3000)}}),
        "[" * 100_000,
        " " * (2 << 20),
    ],
)
def test_configs_that_harm_are_refused(lora_manifest: Manifest, tmp_path: Path, config: str) -> None:
    """As those do whose patterns might match for ever."""
    path = write_lora(tmp_path / "adapter_model.safetensors", make_changes(shapes_in(lora_manifest), seed=1), "peft")
    path.with_name("adapter_config.json").write_text(config)
    message = refused(path, lora_manifest)
    assert "adapter_config.json" in message
    assert len(message) < 500


def test_a_file_that_is_overwritten_afterwards_keeps_the_hash_of_what_was_read(
    lora_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, header and hash are of one reading, although the file is cut short as soon as it is read."""
    path = write_lora(tmp_path / "a.safetensors", make_changes(shapes_in(lora_manifest), seed=1))
    wanted = pack_lora(path, lora_manifest)

    def cut(content: bytes) -> object:
        path.write_bytes(b"")
        return safetensors.deserialize(content)  # type: ignore[no-untyped-call] # its stub has no types

    monkeypatch.setattr("engines.lora.file.deserialize", cut)
    packed = pack_lora(path, lora_manifest)
    assert packed.sha256 == wanted.sha256
    np.testing.assert_array_equal(packed.values, wanted.values)
